"""A comparison on a tiny base: its rows are those of the runs, it goes on where it stopped, a failure is a line."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core import DeltatuneError, load
from deltatune.data import Batches
from deltatune.models.loading import load_base
from deltatune.train import compare as module
from deltatune.train import compare_table
from deltatune.train.compare import (
    LINES,
    LOG,
    Budget,
    Row,
    best,
    compare,
    ordered,
    read,
    recipe_for,
    train_one,
    untrained,
)
from deltatune.train.entrants import entrants, methods, rate
from deltatune.train.loss import evaluate
from deltatune.train.recipe import Recipe
from deltatune.train.run import prepare


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=128)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.of({
        "base": str(tmp_path / "base"), "method": {"name": "lora", "r": 2}, "callbacks": ["lora_plus"],
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 6, "max_length": 64}, "output": str(tmp_path / "run"),
        "train": {"tokens_per_step": 128, "epochs": 9, "lr": 1e-2, "warmup": 1},
    })  # fmt: skip


@pytest.mark.parametrize("text, want", [
    ("90s", Budget(seconds=90)), ("2m", Budget(seconds=120)), ("1.5h", Budget(seconds=5400)),
    ("500-steps", Budget(steps=500)), ("1 step", Budget(steps=1)), ("2k-steps", Budget(steps=2000)),
    ("200k-tokens", Budget(tokens=200_000)), ("1.5M-tokens", Budget(tokens=1_500_000)),
])  # fmt: skip
def test_budgets(text: str, want: Budget) -> None:
    assert Budget.of(text) == want


@pytest.mark.parametrize("text", ["", "2", "m", "0s", "-3m", "5 miles", "2m-steps", "steps"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(DeltatuneError, match="write 90s"):
        Budget.of(text)


def one(name: str) -> Any:
    return entrants([name])[0]


def without_a_process(recipe: Recipe, seconds: Any, home: Path, trains: bool, report: Any) -> Any:
    return train_one(recipe, seconds) if trains else untrained(recipe)


def test_methods_by_name() -> None:
    assert methods("lora, dora,full,LoRA") == ["LoRA", "DoRA", "full"]
    assert {"LoRA", "IA3", "PromptTuning"} < set(methods("all")) and "Init" not in methods("all")
    assert methods("all,base,full")[0] == "base" and methods("all,base,full")[-1] == "full"
    for wrong, told in (("lorra", "did you mean 'LoRA'"), (" , ", "the list is empty")):
        with pytest.raises(DeltatuneError, match=told):
            methods(wrong)


def test_each_method_has_its_own_rate_and_the_rest_is_the_recipe_s(recipe: Recipe, tmp_path: Path) -> None:
    mine = recipe_for(recipe, one("IA3"), Budget(steps=7), tmp_path / "x")
    assert mine.made_method() == dt.IA3() and mine.callbacks == [] and mine.data == recipe.data
    assert (mine.train.lr, mine.train.max_steps, mine.train.epochs, mine.train.warmup) == (dt.IA3.lr, 7, None, 1)
    assert rate("full") < rate("LoRA") == dt.LoRA.lr == dt.core.Method.lr
    assert recipe_for(recipe, one("full"), Budget(tokens=1000), tmp_path).train.max_steps == 8
    alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": None})})
    assert recipe_for(alone, one("LoRA"), Budget(steps=1), tmp_path).data.eval == "5%"
    rows = Recipe.of({**recipe.model_dump(mode="json", include={"base", "data"}), "train": {"batch_size": 4}})
    with pytest.raises(DeltatuneError, match=r"leave train.batch_size out"):
        recipe_for(rows, one("LoRA"), Budget(tokens=1000), tmp_path)


def test_the_numbers_are_those_of_the_run(recipe: Recipe, tmp_path: Path) -> None:
    mine = recipe_for(recipe, one("LoRA"), Budget(steps=4), tmp_path / "one")
    found = train_one(mine, None)
    saved = tmp_path / "one" / "adapter"
    model = load_base(recipe.base, dtype="float32")
    adapter = load(model, saved)
    ready = prepare(mine)
    assert ready.held_out is not None
    rows = Batches(ready.held_out.examples, batch_size=6, pad=ready.tokenizer.pad_token_id)
    assert found["eval_loss"] == pytest.approx(evaluate(model, rows)["eval_loss"], abs=1e-5)
    assert found["trained"] == sum(p.numel() for p in adapter.parameters())
    assert found["file"] == (saved / "adapter_model.safetensors").stat().st_size
    assert found["merges"] is True and found["steps"] == 4 and found["eval_accuracy"] is None
    assert found["peak"] > 1e8 and found["tokens_per_second"] > 0
    assert found["seconds"] == pytest.approx(found["tokens"] / found["tokens_per_second"])
    assert json.loads(json.dumps(found)) == found


def test_a_time_is_turned_into_steps_by_timing_some(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_seconds_per_step", lambda recipe: 0.4)
    found = train_one(recipe_for(recipe, one("IA3"), Budget(seconds=2), tmp_path / "one"), 2.0)
    assert found["steps"] == 5 and found["eval_loss"] > 0
    monkeypatch.undo()
    assert 0 < module._seconds_per_step(recipe_for(recipe, one("IA3"), Budget(seconds=2), tmp_path / "two")) < 5


def test_a_process_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    (row,) = compare(recipe, entrants(["IA3"]), Budget(steps=2), tmp_path / "compare")
    assert row.failed is None and row.merges and row.lr == dt.IA3.lr and row.steps == 2
    assert row.eval_loss is not None and row.eval_loss > 0 and read(tmp_path / "compare") == [row]


def test_it_goes_on_where_it_stopped_and_a_failure_is_a_line(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_apart", without_a_process)
    folder, told = tmp_path / "compare", []
    rows = compare(
        recipe, entrants(["IA3", "BitFit"]), Budget(steps=2), folder, done=lambda row: told.append(row.method)
    )
    assert [row.method for row in rows] == ["IA3", "BitFit"] == told
    assert rows[0].failed is None and rows[1].failed is not None and rows[1].eval_loss is None
    assert "bias" in rows[1].failed and not rows[1].failed.startswith("BitFit")  # a Llama has none
    assert read(folder) == rows and len((folder / LINES).read_text().splitlines()) == 2
    before = (folder / "IA3" / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    told.clear()
    again = compare(
        recipe, entrants(["BitFit", "IA3"]), Budget(steps=2), folder, done=lambda row: told.append(row.method)
    )
    assert told == ["BitFit"] and again[0] == rows[0]
    assert (folder / "IA3" / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    for other, budget in ((recipe, Budget(steps=3)), (recipe.model_copy(update={"seed": 1}), Budget(steps=2))):
        with pytest.raises(DeltatuneError, match="another recipe or budget"):
            compare(other, entrants(["IA3"]), budget, folder)
    changed = recipe.model_copy(update={"method": "vera"})  # each method has its own
    assert compare(changed, entrants(["IA3"]), Budget(steps=2), folder) == [rows[0]]


def test_the_base_itself_and_every_weight(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_apart", without_a_process)
    rows = compare(recipe, entrants(["base", "full"]), Budget(steps=2), tmp_path / "compare")
    base = next(row for row in rows if row.method == "base")
    model, ready = load_base(recipe.base, dtype="float32"), prepare(recipe)
    assert ready.held_out is not None
    held_out = Batches(ready.held_out.examples, batch_size=6, pad=ready.tokenizer.pad_token_id)
    assert base.eval_loss == pytest.approx(evaluate(model, held_out)["eval_loss"], abs=1e-5)
    assert base.trained is None and base.file is None
    text = compare_table.markdown(rows, "")
    assert re.search(r"\| base \|  \| \d", text) and "| full | 0.0001 |" in text


def test_the_base_of_a_comparison_on_four_bits_is_quantised(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_apart", without_a_process)
    four = recipe.model_copy(update={"quantize": "nf4"})
    (row,), (whole,) = (
        compare(r, entrants(["base"]), Budget(steps=1), tmp_path / str(r.quantize)) for r in (four, recipe)
    )
    assert row.failed is None and row.trained is None
    model, ready = load_base(recipe.base, dtype="float32", quantize="nf4"), prepare(recipe)
    assert ready.held_out is not None
    held_out = Batches(ready.held_out.examples, batch_size=6, pad=ready.tokenizer.pad_token_id)
    assert row.eval_loss == pytest.approx(evaluate(model, held_out)["eval_loss"], abs=1e-5)
    assert row.eval_loss != whole.eval_loss


def test_several_learning_rates_of_which_the_best_is_shown(recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_apart", without_a_process)
    wanted = entrants(["base", "LoRA"], (1.0, 100.0))
    assert [e.folder for e in wanted] == ["base", "LoRA", "LoRA-lr0.1"] and wanted[2].lr == pytest.approx(0.1)
    rows = compare(recipe, wanted, Budget(steps=6), tmp_path / "compare")
    loras = [row for row in rows if row.method == "LoRA"]
    assert [row.lr for row in loras] == [pytest.approx(0.1), pytest.approx(1e-3)]  # six steps: the larger goes further
    assert best(rows) == [loras[0], next(row for row in rows if row.method == "base")]
    compare_table.write(rows, tmp_path, "a title")
    assert len(list(csv.DictReader((tmp_path / "compare.csv").open()))) == 3
    assert (tmp_path / "compare.md").read_text().count("| LoRA |") == 1
    for wrong in ((), (0.0, 1.0), (1.0, 1.0)):
        with pytest.raises(DeltatuneError, match="write 0.3,1,3"):
            entrants(["LoRA"], wrong)


def test_a_recipe_brings_its_callbacks_rate_and_options(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: x\ndata: rows.jsonl\nmethod: {name: lora, r: 3}\ncallbacks: [lora_plus]\n"
                    "train: {lr: 3e-3, weight_decay: 0.1, epochs: 7, batch_size: 2}\n")  # fmt: skip
    (entrant,) = entrants(methods(str(file)))
    mine = recipe_for(recipe, entrant, Budget(steps=4), tmp_path / "x")
    assert mine.made_method() == dt.LoRA(r=3) and mine.callbacks == ["lora_plus"] and mine.base == recipe.base
    assert (mine.train.lr, mine.train.weight_decay, mine.train.max_steps, mine.train.batch_size) == (3e-3, 0.1, 4, None)
    assert entrant.name == "mine"
    file.write_text("base: x\ndata: rows.jsonl\nquantize: nf4\n")
    with pytest.raises(DeltatuneError, match="quantize=nf4: set it in the recipe compared on"):
        entrants([str(file)])
    file.write_text("base: x\ndata: rows.jsonl\n")
    with pytest.raises(DeltatuneError, match="two would be called mine"):
        entrants([str(file), str(file)])


def test_a_process_that_is_killed_is_a_line_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remembered(*args: Any, **kwargs: Any) -> Any:
        begun.append(popen(*args, **kwargs))
        return begun[-1]

    def kill(name: str, step: int, steps: int) -> None:
        begun[0].kill()

    monkeypatch.setattr(module.subprocess, "Popen", remembered)
    (row,) = compare(recipe, entrants(["IA3"]), Budget(steps=500), tmp_path / "compare", report=kill)
    assert row.failed == "ended by signal 9 (out of memory?)" and (tmp_path / "compare" / "IA3" / LOG).is_file()


def rows() -> list[Row]:
    one = Row("LoRA", 2e-4, "k", None, 1.5, None, 1000, 4096, 900.0, 2**28, True, 10, 5000, 5.5)
    return [one, dataclasses.replace(one, method="Prompt|Tuning", eval_loss=1.25, trained=40, merges=False,
                                     tokens_per_second=600.0),
            Row("BitFit", 1e-3, "k", "no bias")]  # fmt: skip


def test_tables_and_the_order_in_them(tmp_path: Path) -> None:
    best = ordered(rows())
    assert [row.method for row in best] == ["Prompt|Tuning", "LoRA", "BitFit"]
    right = [dataclasses.replace(row, eval_accuracy=a) for row, a in zip(rows()[:2], (0.9, 0.8), strict=True)]
    assert [row.method for row in ordered(right)] == ["LoRA", "Prompt|Tuning"]
    written = compare_table.write(best, tmp_path, "a title")
    assert [path.name for path in written] == ["compare.csv", "compare.md", "compare.png"]
    text = (tmp_path / "compare.md").read_text()
    assert "| Prompt\\|Tuning | 0.0002 | 1.2500 | 40 | 4.0 KiB | 600 | 1.50 | 256.0 MiB | no | 10 | 5.5 s |" in text
    assert "| 900 | 1.00 | 256.0 MiB |" in text and "time / LoRA" not in compare_table.markdown([best[0]], "")
    assert "accuracy" not in text and "- BitFit: no bias" in text
    with (tmp_path / "compare.csv").open() as file:
        found = list(csv.DictReader(file))
    assert found[1]["trained"] == "1000" and found[2]["failed"] == "no bias" and "key" not in found[0]
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert compare_table.draw(rows()[2:], "") is None and "90.0%" in compare_table.markdown(right, "")


def test_labels_do_not_lie_on_one_another() -> None:
    heights = compare_table._apart([(100.0, 50.0)] * 12 + [(600.0, 50.0)])
    first = sorted(heights[:12])
    assert heights[-1] == heights[0] == 50.0 and min(b - a for a, b in zip(first, first[1:], strict=False)) >= 13
    assert first[-1] - first[0] == 13 * 11


def test_a_damaged_list_says_so(tmp_path: Path) -> None:
    (tmp_path / LINES).write_text('{"method": "LoRA"')
    with pytest.raises(DeltatuneError, match="not a comparison"):
        read(tmp_path)
