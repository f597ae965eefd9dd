"""`deltatune plan`: what a recipe would train, and the memory it needs, without loading a weight."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune.cli.train import File, Json, Overrides
from deltatune.core import Plan
from deltatune.models.quantise import KINDS
from deltatune.train import memory
from deltatune.train.memory import Estimate
from deltatune.train.recipe import Recipe
from deltatune.train.run import prepare


def command(recipe: File, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show which modules RECIPE would train, how many parameters, and the memory by part. Nothing is trained."""
    ready = prepare(Recipe.read(recipe, overrides or []), weights=False)
    memory.warm(ready.dtype)
    process = memory.held() if ready.device.type == "cpu" else 0
    options, estimate = ready.sized(process)
    known = estimate if isinstance(estimate, Estimate) else None
    plan, packing = ready.plan(), ready.may_pack()
    if as_json:
        typer.echo(json.dumps({
            "base": ready.base, "task": ready.task, "method": None if ready.method is None else ready.method.to_dict(),
            "rows": vars(ready.rows.summary), "packing": packing, "max_length": ready.max_length,
            "precision": str(ready.dtype).removeprefix("torch."), "quantize": ready.recipe.quantize,
            "tokens_per_batch": options.tokens_per_batch,
            "sites": [] if plan is None else [vars(site) for site in plan.sites],
            "trained": None if plan is None else plan.trained, "total": None if plan is None else plan.total,
            "memory": known and known.to_dict(), "problem": None if known else str(estimate),
        }))  # fmt: skip
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(str(ready.rows.summary)))
    for note in ready.notes:
        console.print(Text(note, "yellow"))
    how = f"{'packed' if packing else 'padded'} to {ready.max_length} tokens, {str(ready.dtype)[6:]} on {ready.device}"
    if ready.recipe.quantize is not None:
        console.print(Text(f"base in {ready.recipe.quantize}: {KINDS[ready.recipe.quantize].what}"))
    size = f", micro-batches of {options.tokens_per_batch:,} tokens" if options.tokens_per_batch else ""
    console.print(Text(f"task {ready.task}, rows {how}{size}"))
    if plan is None:
        console.print(Text("every weight of the base is trained", "bold"))
    else:
        share = 100 * plan.trained / max(1, plan.total)
        console.print(
            Text(
                f"{len(plan.sites)} sites, {plan.trained:,} trained parameters ({share:.3f} % of {plan.total:,})",
                "bold",
            )
        )
        console.print(_sites(plan))
    console.print(_parts(known) if known else Text(str(estimate), "yellow"))


def _sites(plan: Plan) -> Table:
    """Sites whose paths differ by their numbers alone in one row."""
    table = Table("sites", "module", "kind", "shape", "parameters", box=None, header_style="bold")
    found: dict[tuple[Any, ...], Counter[str]] = {}
    for site in plan.sites:
        shape = "" if site.out is None else f"{site.out} x {site.in_}"
        key = (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", site.path) or "(model)", f"{site.kind}.{site.at}", shape)
        found.setdefault(key, Counter()).update(n=1, parameters=site.parameters)
    for (path, kind, shape), count in found.items():
        table.add_row(str(count["n"]), path, kind, shape, f"{count['parameters']:,}")
    return table


def _parts(estimate: Estimate) -> Table:
    table = Table("memory", "MiB", box=None, header_style="bold")
    table.columns[1].justify = "right"
    for name, size in estimate.to_dict().items():
        if size:
            table.add_row(Text(name, "bold" if name == "total" else ""), f"{size / 2**20:,.0f}")
    return table
