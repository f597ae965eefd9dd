from __future__ import annotations

import json

import pytest
from gguf import GGUFReader
from transformers import AutoModelForCausalLM


def test_a_hugging_face_folder(run, base, law, tmp_path) -> None:
    result = run("export", law, "--to", "hf", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written"]["texts"] == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_gguf_file(run, base, law, tmp_path) -> None:
    out = tmp_path / "law.gguf"
    result = run("export", law, "--to", "gguf", "--base", base, "--output", out)
    assert result.exit_code == 0 and "for llama-cli --lora" in result.stdout, result.output
    assert len(GGUFReader(out).tensors) == 2 * 7 * 2
    assert json.loads(run("export", law, "--to", "gguf", "--output", out, "--json").stdout) == {"file": str(out)}


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_what_the_form_cannot_hold(run, base, style, tmp_path, form) -> None:
    result = run("export", style, "--to", form, "--base", base, "--output", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and not (tmp_path / "out").exists()


def test_an_unknown_form(run, law, tmp_path) -> None:
    result = run("export", law, "--to", "onnx", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "onnx" in result.output
