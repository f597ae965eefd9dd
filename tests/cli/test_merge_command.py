from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from deltatune.core import activate, load
from deltatune.methods.dora import DoRA
from deltatune.methods.ia3 import IA3
from deltatune.methods.lora import LoRA
from deltatune.models.loading import load_base
from deltatune.models.tiny import inputs, tiny
from deltatune.train import merged


def logits(model, seed: int = 1) -> torch.Tensor:
    ids = inputs(model, length=12, seed=seed)["input_ids"]
    with torch.no_grad():
        return model(ids).logits.float()


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def adapted(base: Path, *folders: Path) -> torch.Tensor:
    model = load_base(base, dtype="float32")
    for i, folder in enumerate(folders):
        load(model, folder, f"a{i}")
    activate(model, *(f"a{i}" for i in range(len(folders))))
    return logits(model)


def test_the_folder_is_the_adapter(run, base, law, tmp_path) -> None:
    out = tmp_path / "new" / "merged"
    result = run("merge", base, "--adapter", law, "--output", out, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["folder"] == str(out) and said["written"]["texts"] == said["written"]["prompts"] == 4
    assert 0 < said["merged"]["absolute"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(out)
    assert gap(logits(model), adapted(base, law)) < 1e-5
    assert gap(logits(model), logits(load_base(base))) > 0.1
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert not [n for n in model.state_dict() if "adapters" in n]
    assert [p.name for p in out.parent.iterdir()] == ["merged"]
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in out.iterdir()) and out.stat().st_mode & 0o777 == 0o755


def test_several_are_merged_in_order(run, base, law, save, tmp_path) -> None:
    other = save(base, "scales", IA3())
    result = run("merge", base, "--adapter", law, "--adapter", other, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "merged in float32" in result.stdout and "4 of 4 answers equal" in result.stdout
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert gap(got, adapted(base, law, other)) < 1e-5
    assert gap(got, adapted(base, other, law)) > 1e-2


def test_template_and_end_of_turn_of_the_adapter_come_along(run, base, law, tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages[0].content }}</s>", "</s>"
    tokenizer.save_pretrained(law)
    result = run("merge", "--adapter", law, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.chat_template == "{{ messages[0].content }}</s>" and back.eos_token == "</s>"
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tiny_tokenizer().eos_token_id, back.eos_token_id]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_shared_embedding_that_the_merge_untied(run, make_base, save, tmp_path, target) -> None:
    base = make_base("llama", tie_word_embeddings=True)
    adapter = save(base, "head", LoRA(r=2, targets=target))
    result = run("merge", base, "--adapter", adapter, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert gap(logits(model), adapted(base, adapter)) < 1e-5


def test_a_shared_embedding_that_was_left_alone_stays_shared(run, make_base, save, tmp_path) -> None:
    base = make_base("llama", tie_word_embeddings=True)
    result = run("merge", base, "--adapter", save(base, "a"), "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_the_bases_precision_is_kept_and_its_rounding_told(run, make_base, save, tmp_path) -> None:
    base = make_base("llama", dtype=torch.bfloat16)
    adapter = save(base, "a", LoRA(r=4), size=0.1)
    result = run("merge", base, "--adapter", adapter, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["merged"]["relative"] < 1e-5 < 1e-4 < said["written"]["relative"] < 5e-2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    result = run("merge", base, "--adapter", adapter, "--output", tmp_path / "exact", "--dtype", "float32", "--json")
    assert json.loads(result.stdout)["written"]["relative"] < 1e-5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exact").dtype == torch.float32


def test_above_the_tolerance_nothing_is_written(run, make_base, save, tmp_path) -> None:
    base = make_base("llama", dtype=torch.bfloat16)
    adapter, out = save(base, "a"), tmp_path / "new" / "out"
    result = run("merge", base, "--adapter", adapter, "--output", out, "--tolerance", 1e-4)
    assert result.exit_code == 1
    assert "as written in bfloat16 differs from the adapter: largest logit difference" in result.stderr
    assert "--dtype float32" in result.stderr and list(out.parent.iterdir()) == []


def test_a_merge_that_goes_wrong_is_found_out(run, base, law, tmp_path, monkeypatch) -> None:
    def wrong(model, *names, keep):  # type: ignore[no-untyped-def]
        real(model, *names, keep=keep)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 5] += 1.0

    real = merged.merge
    monkeypatch.setattr(merged, "merge", wrong)
    result = run("merge", base, "--adapter", law, "--output", tmp_path / "out")
    assert result.exit_code == 1 and "the merged model differs from the adapter" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_written_wrong_is_found_out(run, base, law, tmp_path, monkeypatch) -> None:
    def wrong(folder, *args, **kwargs):  # type: ignore[no-untyped-def]
        model = real(folder, *args, **kwargs)
        if Path(folder).name.startswith(".out."):
            torch.nn.init.zeros_(model.lm_head.weight)
        return model

    real = merged.load_base
    monkeypatch.setattr(merged, "load_base", wrong)
    result = run("merge", base, "--adapter", law, "--output", tmp_path / "out")
    assert result.exit_code == 1 and "as written in float32 differs from the adapter" in result.stderr
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_not_a_number_is_no_small_difference() -> None:
    with pytest.raises(ValueError, match="differs from the adapter"):
        merged._refuse_above(1e-3, merged.Difference(float("nan"), float("nan"), 4, 4), "it")


def test_what_cannot_be_merged_says_what_to_do(run, base, style, tmp_path) -> None:
    result = run("merge", base, "--adapter", style, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "acts on activations and cannot be merged; keep it as an adapter: chat, generate" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_left_alone(run, base, law, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("merge", base, "--adapter", law, "--output", out).exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    result = run("merge", base, "--adapter", law, "--output", out)
    assert result.exit_code == 1 and "exists and is not an empty folder" in result.stderr
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}


def test_own_prompts_count_as_well(run, base, law, tmp_path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    result = run(
        "merge", base, "--adapter", law, "--output", tmp_path / "out", "--prompts", tmp_path / "p.jsonl", "--json"
    )
    assert json.loads(result.stdout)["merged"]["prompts"] == 6


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", DoRA()), ("t5", LoRA()), ("gemma", LoRA(targets="all-linear"))]
)
def test_other_architectures(run, make_base, save, tmp_path, family, method) -> None:
    base = make_base(family)
    adapter = save(base, "a", method, size=0.1)
    result = run("merge", base, "--adapter", adapter, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written"]["relative"] < 1e-4


def test_a_classifier(run, tmp_path, save) -> None:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tiny("bert", "classification", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    from deltatune.core import attach

    model = load_base(tmp_path / "base", "classification")
    adapter = attach(model, LoRA(r=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    want = logits(model)
    folder = adapter.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = run("merge", tmp_path / "base", "--adapter", folder, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    got = logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    assert gap(got, want) < 1e-5
