from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltatune.train import compare


@pytest.fixture
def file(tmp_path: Path, base: Path, monkeypatch: Any) -> Path:
    """A recipe; its methods train in this process, which is quicker."""
    monkeypatch.setattr(compare, "_apart", lambda recipe, seconds, *rest: compare.train_one(recipe, seconds))
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"base": str(base), "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 4, "max_length": 64},
              "train": {"tokens_per_step": 128}, "output": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "law.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "law.yaml"


def test_one_table_and_three_files(run: Any, file: Path) -> None:
    options = ("compare", file, "--methods", "ia3,bit_fit", "--budget", "2-steps")
    result = run(*options)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    (row,) = (line for line in lines if line.strip().startswith("IA3 "))
    assert "yes" in row and any("BitFit:" in line and "bias" in line for line in lines)
    folder = file.parent / "run-compare"
    assert {"compare.csv", "compare.md", "compare.png", "comparison.jsonl"} <= {p.name for p in folder.iterdir()}
    again = run(*options, "--json")
    told = json.loads(again.stdout.splitlines()[-1])
    assert [(r["method"], r["failed"] is None) for r in told] == [("IA3", True), ("BitFit", False)]
    assert told[0]["trained"] > 0 and told[0]["peak"] > 0
    other = run("compare", file, "--methods", "ia3", "--budget", "3-steps")
    assert other.exit_code == 1 and "--output" in other.output


@pytest.mark.parametrize(("options", "told"), [
    (("--methods", "lorra"), "did you mean 'LoRA'"), (("--budget", "long"), "500-steps"),
    (("train.lrr=1",), "did you mean 'lr'"),
])  # fmt: skip
def test_wrong_input_is_one_line(run: Any, file: Path, options: tuple[str, ...], told: str) -> None:
    result = run("compare", file, *options)
    assert result.exit_code == 1 and told in result.output and "Traceback" not in result.output
    assert not (file.parent / "run-compare").exists()


def test_nothing_trained_is_an_error(run: Any, file: Path) -> None:
    result = run("compare", file, "--methods", "bitfit", "--budget", "1-steps", "--output", file.parent / "c")
    assert result.exit_code == 1 and "no method was trained" in result.output
    assert "BitFit" in (file.parent / "c" / "compare.md").read_text()
