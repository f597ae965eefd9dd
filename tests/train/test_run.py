from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core import DeltatuneError, load
from deltatune.data import DataError
from deltatune.models.loading import load_base
from deltatune.train import Recipe, run
from deltatune.train import train as trained
from deltatune.train.batching import apart, pointwise

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]


def _base(folder: Path, kind: str = "llama") -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32}
    deep = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 128}
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**size, **deep)),
        "bert": lambda: BertForMaskedLM(BertConfig(**size, **deep)),
        "bloom": lambda: BloomForCausalLM(BloomConfig(**size, n_layer=2, n_head=4)),
    }[kind]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(_base(tmp_path / "base")),
        "data": {"train": _jsonl(tmp_path / "rows.jsonl", ROWS), "eval": 2, "max_length": 64},
        "train": {"max_steps": 3, "tokens_per_step": 128, "lr": 1e-2},
        "output": str(tmp_path / "run"),
    }


def test_a_run_leaves_an_adapter_that_loads_and_answers_alike(recipe: dict[str, Any]) -> None:
    notes: list[Any] = []
    outcome = run(Recipe.of(recipe), report=notes.append)
    config = json.loads((outcome.saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe["base"] and config["task_type"] == "CAUSAL_LM"
    assert (outcome.saved / "tokenizer.json").is_file() and (outcome.saved / "chat_template.jinja").is_file()
    assert outcome.packing and outcome.result.step == 3 and outcome.estimate is not None and outcome.peak > 0
    assert any("12 rows" in note.get("note", "") for note in notes)
    assert any("memory estimate" in note.get("note", "") for note in notes)
    model = load_base(recipe["base"], dtype="float32")
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    load(model, outcome.saved)
    assert not torch.equal(model(ids).logits, before)
    again = Recipe.read(Path(recipe["output"]) / "recipe.yaml")
    assert again.task == "causal" and again.made_method() == dt.LoRA() and again.train.max_steps == 3


def test_the_same_recipe_gives_the_same_adapter(recipe: dict[str, Any], tmp_path: Path) -> None:
    one = run(Recipe.of(recipe))
    two = run(Recipe.of({**recipe, "output": str(tmp_path / "two")}))
    assert (one.saved / "adapter_model.safetensors").read_bytes() == (
        two.saved / "adapter_model.safetensors"
    ).read_bytes()


def test_resume_ends_where_an_unbroken_run_ends(recipe: dict[str, Any], tmp_path: Path) -> None:
    from deltatune.train import loop

    whole = run(Recipe.of(recipe))
    told = {**recipe, "output": str(tmp_path / "broken"), "train": {**recipe["train"], "save_every": 1}}

    def stop(record: Any) -> None:
        if record.get("step") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Recipe.of(told), report=stop)
    with pytest.raises(DeltatuneError, match="--resume"):
        run(Recipe.of(told))
    assert "save_every" in loop.MAY_CHANGE
    resumed = run(Recipe.of(told), resume=True)
    assert (resumed.saved / "adapter_model.safetensors").read_bytes() == (
        whole.saved / "adapter_model.safetensors"
    ).read_bytes()


def test_full_fine_tuning_writes_a_model(recipe: dict[str, Any]) -> None:
    outcome = run(Recipe.of({**recipe, "method": "full"}))
    new, old = load_base(outcome.saved), load_base(recipe["base"])
    assert all(
        not torch.equal(a, b) for (_, a), b in zip(new.named_parameters(), old.parameters(), strict=True) if a.ndim > 1
    )
    assert outcome.estimate is not None and outcome.estimate.optimizer == 8 * sum(p.numel() for p in old.parameters())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classes_train_the_head_too(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    outcome = run(Recipe.of({
        "base": str(_base(tmp_path / "base", kind)), "output": str(tmp_path / "run"),
        "data": {"train": _jsonl(tmp_path / "rows.jsonl", rows), "eval": "25%"},
        "train": {"epochs": 20, "lr": 2e-2, "batch_size": 8},
    }))  # fmt: skip
    assert outcome.summary.task == "classification" and not outcome.packing
    config = json.loads((outcome.saved / "adapter_config.json").read_text())
    assert config["deltatune"]["labels"] == ["good", "bad"] and config["task_type"] == "SEQ_CLS"
    assert outcome.result.history[-1]["eval_accuracy"] == 1.0
    assert outcome.plan is not None and {"classifier", "score"} & {site.path for site in outcome.plan.sites}


@pytest.mark.parametrize(
    "method", ["bitfit", {"name": "lora", "targets": "all-linear"}, {"name": "tune", "targets": "all-layers"}]
)
def test_a_head_is_trained_whole_and_nothing_below_it_in_vain(tmp_path: Path, method: Any) -> None:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("good", "bad")]
    outcome = run(Recipe.of({
        "base": str(_base(tmp_path / "base", "bert")), "output": str(tmp_path / "run"), "method": method,
        "data": {"train": _jsonl(tmp_path / "rows.jsonl", rows)},
        "train": {"max_steps": 2, "lr": 1e-2, "batch_size": 8},
    }))  # fmt: skip
    assert outcome.plan is not None
    paths = [site.path for site in outcome.plan.sites]
    assert paths.count("classifier") == paths.count("bert.pooler.dense") == 2  # its matrix and its bias, once each
    assert len(set(paths)) > 3
    config = json.loads((outcome.saved / "adapter_config.json").read_text())
    assert config["deltatune"]["labels"] == ["good", "bad"]


def test_bases_that_cannot_tell_documents_apart_are_padded(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert apart(load_base(recipe["base"]))
    bloom = _base(tmp_path / "bloom", "bloom")
    assert not apart(load_base(bloom))
    assert not run(Recipe.of({**recipe, "base": str(bloom)})).packing
    asked = {
        **recipe,
        "base": str(bloom),
        "output": str(tmp_path / "other"),
        "data": {**recipe["data"], "packing": True},
    }
    with pytest.raises(DeltatuneError, match="data.packing"):
        run(Recipe.of(asked))


def test_prompts_are_not_packed(recipe: dict[str, Any]) -> None:
    assert not run(Recipe.of({**recipe, "method": {"name": "prompt_tuning", "length": 4}})).packing


def test_train_in_one_line(recipe: dict[str, Any]) -> None:
    model = load_base(recipe["base"], dtype="float32")
    law = dt.attach(model, dt.LoRA(r=2), "law")
    result = trained(model, law, recipe["data"]["train"], epochs=2, batch_size=4, lr=1e-2)
    assert result.step == 6 and result.loss is not None
    other = trained(model, law, ROWS, tokenizer=tiny_tokenizer(), max_steps=1)
    assert other.step == 1
    with pytest.raises(DeltatuneError, match="no option 'epoch'; did you mean 'epochs'"):
        trained(model, law, ROWS, epoch=2)


def _told(recipe: dict[str, Any], **other: Any) -> str:
    with pytest.raises(DeltatuneError) as caught:
        run(Recipe.of({**recipe, **other}))
    return str(caught.value)


def test_errors(recipe: dict[str, Any], tmp_path: Path) -> None:
    output = Path(recipe["output"])
    data = recipe["data"]
    assert "gone.jsonl" in _told(recipe, data=str(tmp_path / "gone.jsonl"))
    assert "empty.jsonl" in _told(recipe, data=_jsonl(tmp_path / "empty.jsonl", []))
    bad = _jsonl(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "x"}, {"prompt": 3, "completion": "y"}])
    with pytest.raises(DataError) as caught:
        run(Recipe.of({**recipe, "data": bad}))
    assert "bad.jsonl:13" in str(caught.value) and "bad.jsonl:14" in str(caught.value)
    assert "rows.jsonl:1" in _told(recipe, data={**data, "max_length": 8, "too_long": "refuse"})
    assert "config.json is missing" in _told(recipe, base=str(tmp_path))
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "kept")
    assert "model.safetensors is missing" in _told(recipe)
    (tmp_path / "kept").rename(tmp_path / "base" / "model.safetensors")
    assert not output.exists()  # nothing is written for a run that cannot begin
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    assert "not empty (thesis.txt)" in _told(recipe)
    with pytest.raises(DeltatuneError, match="no checkpoint"):
        run(Recipe.of(recipe), resume=True)
    bert = _base(tmp_path / "bert", "bert")
    assert "128 tokens that the base can read" in _told(recipe, base=str(bert), output=str(tmp_path / "x"),
                                                        data={**data, "max_length": 999})  # fmt: skip


def test_too_long_rows_go_as_the_recipe_says(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "long " * 90, "completion": "It is."}]
    data = {**recipe["data"], "train": _jsonl(tmp_path / "long.jsonl", rows), "too_long": "drop"}
    assert run(Recipe.of({**recipe, "data": data})).summary.dropped == 1


def test_units_that_see_many_tokens_need_rows_of_their_own(recipe: dict[str, Any]) -> None:
    found = {}
    for method in (dt.LoRA(), dt.Houlsby(), dt.PromptTuning(), dt.PrefixTuning()):
        model = load_base(recipe["base"], dtype="float32")
        found[type(method).__name__] = pointwise(dt.attach(model, method))
    assert found == {"LoRA": True, "Houlsby": True, "PromptTuning": False, "PrefixTuning": False}
