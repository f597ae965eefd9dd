"""A tiny base, with a tokenizer, and adapters of it, as folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from deltatune.cli.main import app
from deltatune.core import Method, attach
from deltatune.methods.houlsby import Houlsby
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny

Saved = Callable[..., Path]


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*args: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], input=input)

    return invoke


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _base(tmp_path / "base", "llama")


def _base(folder: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    tiny(family, vocab_size=len(tokenizer), max_position_embeddings=512, **ids, **overrides).to(dtype).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_base(tmp_path: Path) -> Saved:
    return lambda family, **options: _base(tmp_path / f"base-{family}", family, **options)


@pytest.fixture
def save(tmp_path: Path) -> Saved:
    """Save an adapter of `base` that changes much, under a name."""

    def write(base: Path, name: str, method: Method | None = None, says: bool = False, size: float = 0.3) -> Path:
        from deltatune.models.loading import load_base

        model = load_base(base)
        torch.manual_seed(len(name))
        adapter = attach(model, method or LoRA(r=4), "default")
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) * size)
        folder = adapter.save(tmp_path / "adapters" / name)
        if says:
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        return folder

    return write


@pytest.fixture
def law(base: Path, save: Saved) -> Path:
    return save(base, "law", says=True)


@pytest.fixture
def style(base: Path, save: Saved) -> Path:
    return save(base, "style", Houlsby())
