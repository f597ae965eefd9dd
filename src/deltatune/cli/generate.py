"""`deltatune generate`: answer many prompts, each under its own adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from deltatune.cli import session as shared
from deltatune.cli.session import Sampling, begin, known, named, open_session, read_prompts
from deltatune.core import DeltatuneError
from deltatune.core.adapter import write_atomically
from deltatune.data import DataError


def command(
    base: shared.Base = None,
    adapter: shared.Adapters = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    file: Annotated[str | None, typer.Option(help="Rows with prompt or messages, and optionally adapter.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write rows with their response here, as jsonl.")] = None,
    as_json: shared.Json = False,
    system: shared.System = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 8,
    max_new_tokens: shared.Tokens = 256,
    temperature: shared.Temperature = 0.0,
    top_p: shared.TopP = 1.0,
    seed: shared.Seed = 0,
    template: shared.TemplateName = None,
    dtype: shared.Dtype = "auto",
    proxy: shared.Proxy = None,
    proxy_adapter: shared.ProxyAdapter = None,
    proxy_template: shared.ProxyTemplate = None,
    alpha: shared.Alpha = None,
) -> None:
    """Answer prompts. A row that names no adapter takes the only one given, or the base; null is the base."""
    if bool(prompt) == bool(file):
        raise typer.BadParameter("give either --prompt or --file")
    if output is not None and not output.parent.is_dir():
        raise DeltatuneError(f"output: there is no folder {output.parent}")
    asked = [("", {"prompt": p}, [*begin(system), {"role": "user", "content": p}]) for p in prompt or []]
    asked += read_prompts(file, system) if file else []
    given = list(named(adapter or []))
    names: list[str | None] = []
    for origin, row, _ in asked:
        try:
            names.append(known(row.get("adapter", given[0] if len(given) == 1 else None), given))
        except DeltatuneError as error:
            raise DataError(f"{origin}: {error}") from error
    session = open_session(
        base, adapter, template=template, dtype=dtype,
        proxy=proxy, proxy_adapter=proxy_adapter, proxy_template=proxy_template, alpha=alpha,
    )  # fmt: skip
    torch.manual_seed(seed)
    sampling, rows = Sampling(max_new_tokens, temperature, top_p), []
    console = Console(stderr=True)
    starts = range(0, len(asked), batch_size)
    for i in track(starts, "generating", console=console, disable=not console.is_terminal, transient=True):
        some = slice(i, i + batch_size)
        answers = session.answer([messages for *_, messages in asked[some]], names[some], sampling)
        for (_, row, _), name, answer in zip(asked[some], names[some], answers, strict=True):
            rows.append({**row, "adapter": name, "response": answer})
    _show(rows, output, as_json)


def _show(rows: list[dict[str, Any]], output: Path | None, as_json: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if output is not None:
        write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
    if as_json:
        typer.echo("\n".join(lines))
    elif output is not None:
        typer.echo(f"{output}: {len(rows):,} answers")
    else:
        console = Console(highlight=False, soft_wrap=True)
        for row in rows:
            if len(rows) > 1:
                asked = row.get("prompt") or row["messages"][-1]["content"]
                console.print(Text(f"── {row['adapter'] or 'base'}: {asked}", "dim"))
            console.print(Text(row["response"]))
