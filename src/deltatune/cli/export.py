"""`deltatune export`: an adapter in the form that another program reads."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli import session as shared
from deltatune.cli.merge import Prompts, Tolerance, merge_folder
from deltatune.cli.session import base_of, named
from deltatune.core import load
from deltatune.interop.gguf import write_gguf
from deltatune.models.loading import load_base


class Form(StrEnum):
    hf = "hf"
    gguf = "gguf"


def command(
    adapter: Annotated[str, typer.Argument(help="A saved adapter.")],
    to: Annotated[Form, typer.Option(help="hf: merged, a Hugging Face folder. gguf: a LoRA file for llama.cpp.")],
    output: Annotated[Path, typer.Option(help="The folder (hf) or file (gguf) to write.")],
    base: Annotated[str | None, typer.Option(help="A folder, a hub name or 'default'.")] = None,
    prompts: Prompts = None,
    tolerance: Tolerance = None,
    dtype: shared.Dtype = "auto",
    as_json: shared.Json = False,
) -> None:
    """Write ADAPTER for other programs. The options --prompts, --tolerance and --dtype are merge's, for hf."""
    if to is Form.hf:
        merge_folder(base, [adapter], output, prompts, tolerance, dtype, as_json)
        return
    [(name, folder)] = named([adapter]).items()
    model = load_base(base or base_of([folder]), dtype="float32")
    path = write_gguf(load(model, folder, name), output)
    typer.echo(json.dumps({"file": str(path)}) if as_json else f"{path}: for llama-cli --lora, over this base's GGUF")
