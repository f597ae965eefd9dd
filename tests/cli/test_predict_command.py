"""`deltatune predict`, against logits of one text at a time, without padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune.core import load
from deltatune.models.loading import load_base, load_tokenizer
from deltatune.serve import classify
from deltatune.train import Recipe
from deltatune.train import run as train

TEXTS = ["good 1", "what a bad day that was, and how long it took to end", "bad", "it was good"]


def trained(base: Path, folder: Path, task: str, names: tuple[str, ...] = ("good", "bad")) -> Path:
    if task == "classification":
        rows: list[dict[str, Any]] = [{"text": f"{n} {i}", "label": n} for i in range(8) for n in names]
    else:
        rows = [{"tokens": ["it", "was", n, "then"], "tags": ["O", "O", n, "O"]} for n in names for _ in range(8)]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"base": str(base), "output": str(folder / "run"), "data": {"train": str(folder / "rows.jsonl")},
              "train": {"max_steps": 12, "lr": 2e-2, "batch_size": 8}}  # fmt: skip
    return train(Recipe.of(recipe)).saved


@torch.no_grad()
def alone(base: Path, adapter: Path, task: str, given: Any) -> torch.Tensor:
    model, tokenizer = load_base(base, task), load_tokenizer(base)
    load(model, adapter, "it")
    model.config.pad_token_id = tokenizer.pad_token_id
    words = {"is_split_into_words": True} if task == "tagging" else {}
    return model(**tokenizer(given, return_tensors="pt", **words)).logits[0].softmax(-1)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_texts_under_two_adapters_with_heads_of_their_own(run, make_base, tmp_path, family) -> None:
    base = make_base(family)
    folders = {"one": trained(base, tmp_path / "1", "classification"),
               "two": trained(base, tmp_path / "2", "classification", ("bad", "odd", "good"))}  # fmt: skip
    given = [a for name, folder in folders.items() for a in ("--adapter", f"{name}={folder}")]
    result = run("predict", *given, *[a for t in TEXTS for a in ("--text", t)], "--json", "--batch-size", 3)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["adapter"], r["text"]) for r in rows] == [(n, t) for n in folders for t in TEXTS]
    for row in rows:
        names = {"one": ["good", "bad"], "two": ["bad", "odd", "good"]}[row["adapter"]]
        want = alone(base, folders[row["adapter"]], "classification", row["text"])
        assert row["predicted"] == names[int(want.argmax())]
        assert row["probability"] == pytest.approx(float(want.max()), abs=1e-4)


def test_rows_with_labels_say_how_many_are_right(run, make_base, tmp_path) -> None:
    base = make_base("bert")
    folder = trained(base, tmp_path / "1", "classification")
    rows = [{"sentence": f"{n} {i}", "label": n} for i in range(3) for n in ("good", "bad")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    result = run("predict", "--adapter", f"a={folder}", "--file", tmp_path / "rows.jsonl", "--output", out)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(row["label"] == row["predicted"] for row in found)
    assert f"a: {right} of 6 right" in result.stdout and right >= 4
    shown = run("predict", "--adapter", f"a={folder}", "--text", "good 1")
    assert shown.exit_code == 0 and found[0]["predicted"] in shown.stdout and "right" not in shown.stdout


def test_words_are_tagged(run, make_base, tmp_path) -> None:
    base = make_base("bert")
    folder = trained(base, tmp_path / "1", "tagging")
    words = ["it", "was", "unbelievably", "bad", "then"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"words": words, "tags": ["O", "O", "O", "bad", "O"]}) + "\n")
    result = run("predict", "--adapter", f"a={folder}", "--file", tmp_path / "rows.jsonl", "--json")
    assert result.exit_code == 0, result.output
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    tokenizer = load_tokenizer(base)
    ids = tokenizer(words, is_split_into_words=True).word_ids()
    want = alone(base, folder, "tagging", words)
    names = ["O", "good", "bad"]
    assert row["predicted"] == [names[int(want[ids.index(w)].argmax())] for w in range(5)]
    model = load_base(base, "tagging")
    load(model, folder, "a")
    (cut,) = classify(model, tokenizer, [words], max_length=4)
    assert cut.label[-1] is None and cut.label[0] is not None
    shown = run("predict", "--adapter", f"a={folder}", "--text", "it was bad then")
    assert shown.exit_code == 0 and "it/" in shown.stdout, shown.output


@pytest.mark.parametrize(
    ("args", "says"),
    [(("--text", "a"), "predict needs --adapter"), (("--adapter", "{law}", "--text", "a"), "see: generate"),
     (("--adapter", "{a}", "--file", "{bad}"), "bad.jsonl:1"), (("--adapter", "{a}"), "either --text or --file")],
)  # fmt: skip
def test_what_is_refused(run, make_base, base, law, tmp_path, args, says) -> None:
    config = json.loads((law / "adapter_config.json").read_text())
    (law / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    (tmp_path / "bad.jsonl").write_text('{"text": 3, "label": "good"}\n')
    known = {"{law}": str(law), "{bad}": str(tmp_path / "bad.jsonl")}
    if "{a}" in args:
        known["{a}"] = str(trained(make_base("bert"), tmp_path / "1", "classification"))
    result = run("predict", *(known.get(a, a) for a in args))
    assert result.exit_code != 0 and says in result.output.replace("\n", " "), result.output
