from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from deltatune.cli.main import app

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )).save_pretrained(tmp_path / "base")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {"base": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "run"),
              "train": {"max_steps": 2, "batch_size": 4}}  # fmt: skip
    (tmp_path / "law.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "law.yaml"


def _run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_train_says_what_to_type_next(file: Path) -> None:
    result = _run("train", file, "lr=1e-2", "method.r=2")
    assert result.exit_code == 0, result.output
    assert "2 steps" in result.output and f"deltatune chat --adapter {file.parent / 'run' / 'adapter'}" in result.output
    used = yaml.safe_load((file.parent / "run" / "recipe.yaml").read_text())
    assert used["train"]["lr"] == 1e-2 and used["method"][0]["r"] == 2
    again = _run("train", file, "lr=1e-2", "method.r=2")
    assert again.exit_code == 1 and "not empty" in again.output
    other = _run("train", file, f"output={file.parent / 'other'}", "--json")
    told = json.loads(other.output.splitlines()[-1])
    assert told["step"] == 2 and told["memory"]["peak"] > 0 and told["saved"].endswith("other/adapter")


def test_resume(file: Path) -> None:
    assert _run("train", file).exit_code == 0
    assert _run("train", file, "--resume").exit_code == 0
    assert _run("train", file, "resume=true").exit_code == 0
    result = _run("train", file, "lr=3e-4", "--resume")
    assert result.exit_code == 1 and "lr was" in result.output
    result = _run("train", file, f"output={file.parent / 'none'}", "--resume")
    assert result.exit_code == 1 and "no checkpoint" in result.output


def test_wrong_input_is_one_line_and_exit_code_1(file: Path) -> None:
    for override, told in (("lrr=1", "did you mean 'lr'"), ("method=lorra", "did you mean 'LoRA'")):
        result = _run("train", file, override)
        assert result.exit_code == 1 and told in result.output and "Traceback" not in result.output
    assert _run("train").exit_code == 2


def test_plan_needs_no_weights(file: Path) -> None:
    (file.parent / "base" / "model.safetensors").unlink()
    result = _run("plan", file, "method.r=2")
    assert result.exit_code == 0, result.output
    assert (
        "14 sites" in result.output and "model.layers.*.self_attn.q_proj" in result.output and "total" in result.output
    )
    told = json.loads(_run("plan", file, "method.r=2", "--json").output)
    assert told["trained"] == sum(site["parameters"] for site in told["sites"]) == 2 * 2 * (4 * 64 + 3 * 96)
    assert told["memory"]["total"] > told["memory"]["process"] > 0
    assert not (file.parent / "run").exists()


def test_plan_of_seven_billion_parameters(file: Path) -> None:
    shutil.rmtree(file.parent / "base")
    tokenizer = tiny_tokenizer()
    LlamaConfig().save_pretrained(file.parent / "base")  # the defaults are Llama 7B's
    tokenizer.save_pretrained(file.parent / "base")
    told = json.loads(_run("plan", file, "--json").output)
    size = {"float32": 4, "bfloat16": 2}[told["precision"]]
    assert told["total"] > 6.5e9 and 0 <= told["memory"]["base"] - size * told["total"] < 4096
