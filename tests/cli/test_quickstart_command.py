from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from deltatune.cli import quickstart
from deltatune.cli.main import app


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )).save_pretrained(tmp_path / "base")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(quickstart, "default_base", lambda report: tmp_path / "base")
    return tmp_path


def _run(*args: object) -> Any:
    return CliRunner().invoke(app, ["quickstart", *(str(arg) for arg in args)], env={"COLUMNS": "200"})


def test_it_shows_before_and_after(base: Path) -> None:
    result = _run("--output", base / "run", "--epochs", 1)
    assert result.exit_code == 0, result.output
    for text in (
        "before",
        "after",
        "held-out loss",
        "right answers",
        "of 24",
        f"deltatune chat --adapter {base / 'run' / 'adapter'}",
    ):
        assert text in result.output
    assert (base / "run" / "adapter" / "adapter_config.json").is_file()
    again = _run("--output", base / "run")
    assert again.exit_code == 1 and "not empty" in again.output


def test_it_learns(base: Path) -> None:
    result = _run("--output", base / "run", "--epochs", 3, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert told["eval_loss"]["after"] < told["eval_loss"]["before"] and len(told["answers"]) == 24
    assert told["best"]["eval_loss"] == pytest.approx(told["eval_loss"]["after"], rel=0.02)
