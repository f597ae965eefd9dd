"""`deltatune compare`: methods side by side, on one base and one data set, under one budget."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from deltatune.cli.train import File, Json, Overrides
from deltatune.core import DeltatuneError
from deltatune.train import compare_table
from deltatune.train.compare import Budget, Row, best, compare
from deltatune.train.entrants import entrants, methods
from deltatune.train.recipe import Recipe

Names = Annotated[
    str,
    typer.Option("--methods", help="all, or names: lora,dora,ia3; full: every weight; base: none; or a recipe.yaml."),
]
Rates = Annotated[str, typer.Option("--rates", help="Multiples of each one's own learning rate: 0.3,1,3.")]
Limit = Annotated[str, typer.Option("--budget", help="Of each: 90s, 2m, 1h, 500-steps or 200k-tokens.")]
Folder = Annotated[Path | None, typer.Option("--output", help="By default the recipe's output with -compare behind.")]
WIDE = 160  # columns: a narrower terminal breaks lines, which is better than a number cut short


def command(
    recipe: File,
    overrides: Overrides = None,
    names: Names = "all",
    budget: Limit = "2m",
    rates: Rates = "1",
    output: Folder = None,
    as_json: Json = False,
) -> None:
    """Train every method, as it is by default and at its own learning rate, on RECIPE's base and data.

    A method may also be the file of a recipe, whose method, callbacks and learning rate count. With --rates each
    trains at several, and its best is shown; compare.csv has all. Run again, it goes on with those not finished.
    """
    asked, limit = Recipe.read(recipe, overrides or []), Budget.of(budget)
    wanted = entrants(methods(names), _factors(rates))
    folder = (output or Path(f"{asked.output}-compare")).expanduser()
    title = f"{asked.base}, {asked.data.train}: {limit} each"
    console = Console(highlight=False, soft_wrap=True, stderr=as_json)
    with nullcontext(None) if as_json else _progress(console, len(wanted)) as shown:
        rows = compare(asked, wanted, limit, folder, report=None if shown is None else shown.report,
                       done=None if shown is None else shown.done)  # fmt: skip
    written = compare_table.write(rows, folder, title)
    if as_json:
        typer.echo(json.dumps([{k: v for k, v in dataclasses.asdict(row).items() if k != "key"} for row in rows]))
    else:
        console.print(_table(best(rows)), soft_wrap=False, width=max(console.width, WIDE), crop=False)
        for row in rows:
            if row.failed is not None:
                console.print(Text(f"{row.method}: {row.failed}", "yellow"))
        console.print(Text(", ".join(map(str, written)), "dim"))
    if all(row.failed is not None for row in rows):
        raise DeltatuneError(f"no method was trained; the reasons are in {folder / 'compare.md'}")


def _factors(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DeltatuneError(f"rates: {text!r} is no list of numbers; write 0.3,1,3") from None


class _Shown(Progress):
    """How many methods are done, and the steps of the one that trains."""

    def begin(self, total: int) -> None:
        self.task = self.add_task("starting", total=total)

    def report(self, method: str, step: int, steps: int) -> None:
        self.update(self.task, description=f"{method}: {f'step {step:,} of {steps:,}' if step else 'loading'}")

    def done(self, row: Row) -> None:
        speed = "" if row.tokens_per_second is None else f", {row.tokens_per_second:,.0f} tokens/s"
        told = row.failed or f"eval loss {row.eval_loss:.4f}{speed}"
        self.console.print(Text(f"{row.method}: {told}"), soft_wrap=True)
        self.advance(self.task)


def _progress(console: Console, total: int) -> _Shown:
    shown = _Shown(
        BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), console=console
    )
    shown.begin(total)
    return shown


def _table(rows: list[Row]) -> Table:
    titles, cells = compare_table.table(rows)
    found: Any = Table(box=None, header_style="bold")
    for title in titles:
        found.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for line in cells:
        found.add_row(Text(line[0], "cyan"), *line[1:])
    return found
