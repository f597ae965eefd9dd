"""`deltatune methods`: what there is, what it trains, and its options."""

from __future__ import annotations

import dataclasses
import difflib
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
from deltatune.core import Callback, DeltatuneError, Init, Method, adapters, attach, detach

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
    with Console(stderr=True).status(f"counting what each trains on {REFERENCE}"):
        rows = [describe(c) for c in classes.values()]
    typer.echo(json.dumps(rows, indent=2)) if as_json else _list(rows)


def _find(name: str, classes: dict[str, type]) -> type:
    by_key = {_key(n): n for n in classes}
    if (key := _key(name)) in by_key:
        return classes[by_key[key]]
    near = [repr(by_key[k]) for k in difflib.get_close_matches(key, by_key)]
    hint = f"did you mean {' or '.join(near)}?" if near else "see: deltatune methods"
    raise DeltatuneError(f"no method, init, router or callback is called {name!r}; {hint}")


def _key(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def describe(cls: type) -> dict[str, Any]:
    """Name, kind, paper, text, options; of a method its learning rate, what it trains on `REFERENCE`, and whether it
    can be merged."""
    paper = inspect.getdoc(sys.modules[cls.__module__]) or ""
    own = inspect.getdoc(cls) if "__doc__" in vars(cls) else None
    generated = own is None or own.startswith(f"{cls.__name__}(")  # what dataclasses write
    found = {
        "name": cls.__name__,
        "kind": next((kind for kind, base in KINDS.items() if issubclass(cls, base)), "router"),
        "summary": paper.splitlines()[0] if paper else "",
        "text": "\n\n".join(filter(None, [paper, "" if generated else own])),
        "options": _options(cls),
    }
    return found | ({"lr": cls.lr} | measure(cls) if issubclass(cls, Method) else {})


def _options(cls: type) -> list[dict[str, Any]]:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    found = []
    for p in inspect.signature(cls).parameters.values():
        required = p.default is p.empty
        default = None if required else str(made.get(p.name, p.default))
        found.append({"name": p.name, "type": str(p.annotation), "default": default, "required": required})
    return found


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
    """`trained` parameters and `mergeable`, with defaults; None, and `why`, where the reference does not do."""
    model = _reference()
    try:
        adapter = attach(model, cls())
        return {"trained": sum(p.numel() for p in adapter.parameters()), "mergeable": adapter.mergeable}
    except DeltatuneError as error:
        return {"trained": None, "mergeable": None, "why": str(error)}
    finally:
        if adapters(model):
            detach(model)


def _list(rows: list[dict[str, Any]]) -> None:
    table = Table("name", "kind", "merges", "trains", "paper", box=None, header_style="bold")
    for row in rows:
        merges = {True: "yes", False: "no", None: ""}[row.get("mergeable")]
        trained = f"{row['trained']:,}" if row.get("trained") is not None else ""
        name = Text(row["name"], "cyan")
        table.add_row(name, row["kind"], merges, Text(trained, justify="right"), Text(row["summary"]))
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
    if "lr" in row:
        console.print(Text(f"Trains at a learning rate of {row['lr']:g} where the recipe says no other\n"))
    table = Table("option", "default", "type", box=None, header_style="bold")
    for option in row["options"]:
        default = "(required)" if option["required"] else option["default"]
        table.add_row(Text(option["name"], "cyan"), Text(default), Text(option["type"], "dim"))
    console.print(table)
