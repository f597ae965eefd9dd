from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from deltatune.cli.data import app
from deltatune.core.errors import DeltatuneError
from deltatune.data import DataError

GOOD = [{"prompt": "Who are you?", "completion": "A lamp."}, {"prompt": "Why?", "completion": "To shine."}]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, {"prompt": "x"}]) + "{\n")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path


def _run(*args: object, env: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env)


def test_check_a_good_file(files: Path) -> None:
    result = _run("check", files / "good.jsonl")
    assert result.exit_code == 0 and "2 rows, all good; format completion" in result.output
    result = _run("check", files / "good.jsonl", "--json")
    assert json.loads(result.output)["format"] == "completion"


def test_check_a_bad_file(files: Path) -> None:
    result = _run("check", files / "bad.jsonl")
    assert result.exit_code == 1 and isinstance(result.exception, DataError)
    assert len(result.exception.problems) == 2
    result = _run("check", files / "bad.jsonl", "--json")
    report = json.loads(result.output)
    assert result.exit_code == 1 and not report["ok"]
    assert any("bad.jsonl:3: field 'completion' is missing" in line for line in report["problems"])


def test_check_with_named_columns(files: Path) -> None:
    (files / "q.jsonl").write_text('{"question": "a", "kind": "b"}\n')
    result = _run("check", files / "q.jsonl", "--column", "text=question", "--column", "label=kind")
    assert result.exit_code == 0 and "format classification" in result.output
    assert _run("check", files / "q.jsonl", "--column", "text").exit_code == 2


def test_show_colours_what_is_trained(files: Path) -> None:
    colours = {"FORCE_COLOR": "1", "TERM": "xterm"}
    result = _run("show", files / "good.jsonl", "--base", files / "base", "-n", 1, env=colours)
    assert result.exit_code == 0, result.exception
    assert "\x1b[32mA lamp.<|im_end|>\x1b[0m" in result.output
    assert "Who are you?<|im_end|>" in result.output and "To shine" not in result.output
    assert "2 rows (completion)" in result.output


def test_show_as_json(files: Path) -> None:
    result = _run("show", files / "good.jsonl", "--base", files / "base", "--template", "human-assistant", "--json")
    report = json.loads(result.output)
    assert report["summary"]["template"] == "human-assistant" and len(report["rows"]) == 2
    row = report["rows"][0]
    assert row["text"] == "Human: Who are you?\n\nAssistant: A lamp.<|im_end|>"
    assert row["trained"] == sum(label != -100 for label in row["labels"])


def test_show_a_classification(files: Path) -> None:
    (files / "c.jsonl").write_text('{"text": "fox", "label": "animal"}\n{"text": "lamp", "label": "thing"}\n')
    result = _run("show", files / "c.jsonl", "--base", files / "base")
    assert result.exit_code == 0 and "fox\n→ animal" in result.output


def test_show_says_what_is_wrong(files: Path) -> None:
    result = _run("show", files / "good.jsonl", "--base", files / "nothing")
    assert isinstance(result.exception, DeltatuneError) and "base: no tokenizer in" in str(result.exception)
    result = _run("show", files / "good.jsonl", "--base", files / "base", "--task", "guess")
    assert result.exit_code == 2 and "not one of" in result.output
