"""`deltatune methods`: what there is, what it trains, and its options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from functools import cache
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune import registry
from deltatune.core import Callback, Delta, DeltatuneError, Init, Method, adapters, attach, detach, nearest

KINDS: dict[str, type] = {"method": Method, "init": Init, "callback": Callback}  # what else there is are routers
REFERENCE = "a Llama of 135 million parameters"


def command(
    name: Annotated[str | None, typer.Argument(help="Explain this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List every method, init, router and callback; with NAME its equations and options."""
    classes = {n: c for package in registry.PACKAGES for n, c in registry.public(package).items()}
    if name is not None:
        found = describe(_find(name, classes))
        typer.echo(json.dumps(found, indent=2)) if as_json else _explain(found)
        return
    rows = [describe(c) for c in classes.values()]
    typer.echo(json.dumps(rows, indent=2)) if as_json else _list(rows)


def _find(name: str, classes: dict[str, type]) -> type:
    plain = {"".join(c for c in n.casefold() if c.isalnum()): n for n in classes}
    key = "".join(c for c in name.casefold() if c.isalnum())
    if key not in plain:
        hint = nearest(key, plain)
        for word, real in plain.items():
            hint = hint.replace(f"'{word}'", f"'{real}'")
        raise DeltatuneError(f"no method, init, router or callback is called {name!r}{hint or '; see: deltatune methods'}")
    return classes[plain[key]]


def describe(cls: type) -> dict[str, Any]:
    """Name, kind, paper, text, options; for a method what it trains on `REFERENCE`, and whether it can be merged."""
    paper = inspect.getdoc(sys.modules[cls.__module__]) or ""
    own = inspect.getdoc(cls) if "__doc__" in vars(cls) else None
    generated = own is None or own.startswith(f"{cls.__name__}(")  # what dataclasses write
    found: dict[str, Any] = {
        "name": cls.__name__,
        "kind": next((kind for kind, base in KINDS.items() if issubclass(cls, base)), "router"),
        "summary": paper.splitlines()[0] if paper else "",
        "text": "\n\n".join(filter(None, [paper, "" if generated else own])),
        "options": _options(cls),
    }
    return found | (measure(cls) if issubclass(cls, Method) else {})


def _options(cls: type) -> list[dict[str, Any]]:
    if dataclasses.is_dataclass(cls):
        options = [(f.name, f.type, f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
                   for f in dataclasses.fields(cls)]  # fmt: skip
        return [{"name": n, "type": str(t), "default": None if d is dataclasses.MISSING else str(d),
                 "required": d is dataclasses.MISSING} for n, t, d in options]  # fmt: skip
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [{"name": p.name, "type": str(p.annotation), "default": None if p.default is p.empty else str(p.default),
             "required": p.default is p.empty} for p in parameters]  # fmt: skip


@cache
def _reference() -> Any:
    """Without storage: only shapes count."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def measure(cls: type[Method]) -> dict[str, Any]:
    """`trained` parameters and `mergeable`, with the method's defaults; None where those do not fit the reference."""
    model = _reference()
    try:
        adapter = attach(model, cls())
        units = [unit for _, _, unit, _ in adapter.sites()]
        trained = sum(p.numel() for p in adapter.parameters())
        return {"trained": trained, "mergeable": all(isinstance(unit, Delta) for unit in units)}
    except (DeltatuneError, TypeError, NotImplementedError, RuntimeError):
        return {"trained": None, "mergeable": None}
    finally:
        if adapters(model):
            detach(model)


def _list(rows: list[dict[str, Any]]) -> None:
    table = Table("name", "kind", "merges", "trains", "paper", box=None, header_style="bold")
    for row in rows:
        merges = {True: "yes", False: "no", None: ""}[row.get("mergeable")]
        trained = f"{row['trained']:,}" if row.get("trained") is not None else ""
        table.add_row(Text(row["name"], "cyan"), row["kind"], merges, Text(trained, justify="right"), Text(row["summary"]))
    console = Console()
    console.print(table)
    console.print(Text(f"'trains': parameters with the defaults, on {REFERENCE}. More: deltatune methods NAME", "dim"))


def _explain(row: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{row['name']} ({row['kind']})\n", "bold"))
    console.print(Text(row["text"] + "\n"))
    if row.get("trained") is not None:
        merges = "can be merged" if row["mergeable"] else "cannot be merged"
        console.print(Text(f"{row['trained']:,} trained parameters on {REFERENCE}; {merges}\n"))
    table = Table("option", "default", "type", box=None, header_style="bold")
    for option in row["options"]:
        default = "(required)" if option["required"] else option["default"]
        table.add_row(Text(option["name"], "cyan"), Text(default), Text(option["type"], "dim"))
    console.print(table)
