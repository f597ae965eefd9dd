"""`deltatune merge`: an adapter and its base become one model, proven equal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli import session as shared
from deltatune.cli.session import base_of, named, read_prompts
from deltatune.train.merged import PROMPTS, write_merged

Tolerance = Annotated[
    float | None,
    typer.Option(help="Largest relative difference; by default 1e-3, 1e-2 in float16, 5e-2 in bfloat16.", min=0),
]
Prompts = Annotated[str | None, typer.Option(help="A file of prompts to compare on as well.")]
Output = Annotated[Path, typer.Option(help="An empty or new folder.")]


def command(
    output: Output,
    adapter: Annotated[list[str], typer.Option("--adapter", help="A saved adapter; several are merged in order.")],
    base: shared.Base = None,
    prompts: Prompts = None,
    tolerance: Tolerance = None,
    dtype: shared.Dtype = "auto",
    as_json: shared.Json = False,
) -> None:
    """Merge adapters into BASE, compare with the adapters on prompts, and write a complete Hugging Face folder."""
    merge_folder(base, adapter, output, prompts, tolerance, dtype, as_json)


def merge_folder(base: str | None, adapters: list[str], output: Path, prompts: str | None, tolerance: float | None,
                 dtype: str, as_json: bool) -> None:  # fmt: skip
    folders = list(named(adapters).values())
    more = [str(messages[-1]["content"]) for *_, messages in read_prompts(prompts)] if prompts else []
    done = write_merged(
        base or base_of(folders), folders, output, prompts=[*PROMPTS, *more], tolerance=tolerance, dtype=dtype
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done) | {"folder": str(done.folder)}))
        return
    typer.echo(f"merged in float32:  {done.merged}\nwritten, read back: {done.written}\n{done.folder}")
