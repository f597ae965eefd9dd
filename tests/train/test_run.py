from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core import DeltatuneError, load
from deltatune.data import DataError
from deltatune.models.loading import load_base
from deltatune.train import Recipe, run
from deltatune.train import train as trained
from deltatune.train.batching import apart, packs
from deltatune.train.checkpoint import read, restore_weights
from deltatune.train.memory import Estimate
from deltatune.train.run import prepare

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


(QUESTION,) = tiny_tokenizer().encode("?", add_special_tokens=False)
PACKED = {
    "rows": [{"name": "prefix_tuning", "length": 3, "hidden": 5}, {"name": "p_tuning_v2", "length": 3, "dropout": 0.0},
             {"name": "mam", "length": 3, "hidden": 5, "size": 4},
             {"name": "s4", "budget": 3000, "strategies": [["adapter", "lora"], ["adapter", "prefix"]] * 2},
             {"name": "unipelt", "length": 3, "hidden": 5, "r": 2, "size": 4}],
    "blocks": ["lora", {"name": "ladder_side_tuning", "reduction": 2},
               {"name": "p_tuning", "length": 2, "token": QUESTION}],
}  # fmt: skip


def _packs(recipe: Recipe, asked: bool | None = None) -> str:
    ready = prepare(recipe)
    model = ready.load()
    assert apart(model) and ready.method is not None
    dt.attach(model, ready.method)
    try:
        return packs(model, True, asked, recipe.train, 64)
    finally:
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(("how", "method"), [(how, method) for how, methods in PACKED.items() for method in methods],
                         ids=str)  # fmt: skip
def test_packed_documents_have_the_loss_that_each_has_alone(
    recipe: dict[str, Any], tmp_path: Path, how: str, method: Any
) -> None:
    rows = [{"prompt": f"? {i} or {i + 1}?", "completion": f"It is {i}."} for i in range(11)]
    found = []
    for packing in (True, False):
        told = Recipe.of({
            **recipe, "method": method, "output": str(tmp_path / f"{packing}"),
            "data": {"train": _jsonl(tmp_path / "rows.jsonl", rows), "max_length": 64, "packing": packing},
            "train": {"max_steps": 1, "tokens_per_step": 2048, "tokens_per_batch": 2048},
        })  # fmt: skip
        if packing:
            assert _packs(told) == how
        outcome = run(told)
        assert outcome.packing is packing and isinstance(outcome.estimate, Estimate)
        found.append(outcome.result.history[-1])
    packed, padded = found
    assert packed["trained_tokens"] == padded["trained_tokens"]
    assert packed["loss"] == pytest.approx(padded["loss"], abs=1e-5)


@pytest.mark.parametrize("method", [
    {"name": "prompt_tuning", "length": 4}, {"name": "multitask_prompt", "length": 4}, {"name": "longlora", "r": 2},
], ids=str)  # fmt: skip
def test_methods_under_which_documents_would_mix_have_a_row_for_each(recipe: dict[str, Any], method: Any) -> None:
    """In LongLoRA's training too, whose groups are cut out of the row; inference has none."""
    told = Recipe.of({**recipe, "method": method})
    assert _packs(told) == "none" == prepare(told).likely() or method["name"] == "longlora"
    with pytest.raises(DeltatuneError, match="the method needs a row each"):
        _packs(told, asked=True)


def _weights(outcome: Any) -> dict[str, torch.Tensor]:
    return load_file(outcome.saved / "adapter_model.safetensors")


NETWORKS = [
    ("bloom", {"name": "prefix_tuning", "length": 3, "hidden": 5}),
    ("llama", {"name": "mam", "length": 3, "hidden": 5, "size": 4}),
    ("llama", {"name": "unipelt", "length": 3, "hidden": 5, "r": 2, "size": 4}),
    ("llama", [{"name": "lora", "r": 2}, {"name": "mam", "length": 3, "hidden": 5, "size": 4}]),
    ("llama", {"name": "p_tuning", "length": 1, "token": QUESTION}),
    ("llama", {"name": "p_tuning", "length": 1, "token": QUESTION, "encoder": "mlp"}),
]


@pytest.mark.parametrize(("base", "method"), NETWORKS, ids=str)
def test_what_only_training_needs_is_in_the_checkpoints_alone(recipe: dict[str, Any], tmp_path: Path, base: str,
                                                             method: Any) -> None:  # fmt: skip
    given = {
        **recipe,
        "base": str(_base(tmp_path / base, base)),
        "method": method,
        "train": {**recipe["train"], "save_every": 1},
    }
    outcome = run(Recipe.of(given))
    asked = Recipe.of(given).made_method()
    assert asked is not None and asked.flat() != asked
    model, kept = (load_base(given["base"], dtype="float32") for _ in range(2))
    adapter = load(model, outcome.saved)
    assert adapter.method == asked.flat() and not any("shared." in name for name in _weights(outcome))
    network = dt.attach(kept, asked)
    assert sum(p.numel() for p in adapter.parameters()) < sum(p.numel() for p in network.parameters())
    ids = torch.tensor([[3, QUESTION, 5, QUESTION, 7, 8]])
    drawn = kept(ids).logits
    restore_weights(kept, network, read(outcome.result.checkpoint).tensors["weights"])  # type: ignore[arg-type]
    assert torch.equal(model(ids).logits, kept(ids).logits) and not torch.equal(kept(ids).logits, drawn)

    def stop(record: Any) -> None:
        if record.get("step") == 2:
            raise KeyboardInterrupt

    broken = {**given, "output": str(tmp_path / "broken")}
    with pytest.raises(KeyboardInterrupt):
        run(Recipe.of(broken), report=stop)
    resumed = _weights(run(Recipe.of(broken), resume=True))
    again = _weights(run(Recipe.of(given), resume=True))  # a run that is finished
    for name, t in _weights(outcome).items():
        assert torch.equal(resumed[name], t) and torch.equal(again[name], t)
    with pytest.raises(DeltatuneError, match="max_steps was 3 in the saved run and is 5 now"):
        run(Recipe.of({**given, "train": {**given["train"], "max_steps": 5}}), resume=True)
    more = trained(model, adapter, given["data"]["train"], max_steps=1, output=tmp_path / "more")
    assert more.step == 1
    with pytest.raises(DeltatuneError, match="method was .*; restore it, or start a new run"):
        trained(kept, network, given["data"]["train"], max_steps=1, output=tmp_path / "more", resume=True)


def test_what_a_next_stage_goes_on_from_is_saved_as_it_is(recipe: dict[str, Any]) -> None:
    outcome = run(Recipe.of({**recipe, "method": {"name": "multitask_prompt", "length": 3}}))
    assert load(load_base(recipe["base"]), outcome.saved).method == dt.MultitaskPrompt(length=3)
