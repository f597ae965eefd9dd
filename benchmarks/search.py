"""The learning rate of every method, searched, and its size: see `benchmarks/rates.md`.

    python benchmarks/search.py trec.yaml rates.jsonl --steps 60 [--methods all] [--share 0/2] [--sizes]

From a method's present rate up, or down, by a half decade a trial for as long as the loss on held-out rows falls. Each
trial is a run as `deltatune compare` makes it, of so many steps, one line in the file; a line that is there is not run
again. `--share 0/2`: every second method, for two processes side by side. `--table` prints what the file says: of the
rates within 2 % of the best loss the smallest, since a short run likes larger rates than a long one. With `--sizes`
the trials are instead half and twice the size of each method that has one, and that size, at its present rate.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from deltatune.core import DeltatuneError, Method
from deltatune.registry import named
from deltatune.train.compare import Budget, recipe_for, train_one, untrained
from deltatune.train.entrants import BASE, entrants, methods, rate
from deltatune.train.recipe import FULL, Recipe

HALF_DECADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CLOSE = 1.02
SIZES = ("r", "size", "density", "length", "block_size", "d", "retention", "budget")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("rates", type=Path)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--start", type=float, default=1.0, choices=HALF_DECADES, help="a multiple of the present rate")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print((table_of_sizes if given.sizes else table)(_lines(given.rates)))
        return
    mine, of = map(int, given.share.split("/"))
    for name in methods(given.methods)[mine::of]:
        if given.sizes:
            search_size(Recipe.read(given.recipe), name, given.steps, given.rates)
        else:
            search(Recipe.read(given.recipe), name, given.start, given.steps, given.rates)


def search(recipe: Recipe, name: str, first: float, steps: int, rates: Path) -> None:
    """The trials of one method."""

    def loss(factor: float) -> float:
        known = next((r for r in _lines(rates) if (r["method"], r["factor"]) == (name, factor)), None)
        found = known or _trial(recipe, name, factor, steps, rates)
        return found.get("eval_loss") or float("inf")

    if name == BASE:
        loss(1.0)
        return
    best, at = loss(first), HALF_DECADES.index(first)
    for way in (1, -1):
        start = at
        while 0 <= at + way < len(HALF_DECADES) and (new := loss(HALF_DECADES[at + way])) < best:
            best, at = new, at + way
        if at != start:
            return


def size_of(name: str) -> tuple[str, float] | None:
    """The option that says how large a method is, and what it is by default."""
    if name in (BASE, FULL):
        return None
    found = {f.name: f.default for f in fields(named(Method, name)) if f.name in SIZES}
    return next(((option, found[option]) for option in SIZES if option in found), None)


def search_size(recipe: Recipe, name: str, steps: int, rates: Path) -> None:
    if (size := size_of(name)) is None:
        return
    option, default = size
    for times in (1, 0.5, 2):
        value = type(default)(default * times)
        if value and not any(line["method"] == name and line["size"] == value for line in _lines(rates)):
            _trial(recipe, name, 1.0, steps, rates, **{option: value})


def table_of_sizes(lines: list[dict[str, Any]]) -> str:
    rows = ["| method | option | default | trials: size loss |", "|---|---|---|---|"]
    for name in dict.fromkeys(line["method"] for line in lines):
        option, default = size_of(name) or ("", 0)
        tried = sorted((t for t in lines if t["method"] == name and t.get("eval_loss")), key=lambda t: t["size"])
        told = ", ".join(f"{t['size']:g} {t['eval_loss']:.2f}" for t in tried)
        rows.append(f"| {name} | {option} | {default:g} | {told} |")
    return "\n".join(rows)


def _trial(recipe: Recipe, name: str, factor: float, steps: int, rates: Path, **size: float) -> dict[str, Any]:
    line: dict[str, Any] = {"method": name, "factor": factor, "steps": steps}
    if size:
        (line["size"],) = size.values()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            (entrant,) = entrants([name], [factor] if name != BASE else [1.0])
            line["lr"] = entrant.lr
            if size:
                entrant = replace(entrant, spec={"name": name, **size})
            mine = recipe_for(recipe, entrant, Budget(steps=steps), Path(folder) / "run")
            line |= train_one(mine, None) if entrant.trains else untrained(mine)
        except (DeltatuneError, TypeError) as error:
            line["failed"] = " ".join(str(error).split())
    line["wall"] = round(time.perf_counter() - began, 1)
    with rates.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print({k: line.get(k) for k in ("method", "lr", "eval_loss", "eval_accuracy", "wall", "failed")}, flush=True)
    return line


def _lines(rates: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rates.read_text(encoding="utf-8").splitlines()] if rates.is_file() else []


def chosen(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The line of each method whose rate is to be its default."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(line["method"] for line in lines):
        tried = [line for line in lines if line["method"] == name and line.get("eval_loss") is not None]
        if tried:
            enough = CLOSE * min(line["eval_loss"] for line in tried)
            found[name] = min((t for t in tried if t["eval_loss"] <= enough), key=lambda t: t.get("lr") or 0)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| method | default | best | loss | accuracy | trials: rate loss |", "|---|---|---|---|---|---|"]
    for name, line in chosen(lines).items():
        tried = [t for t in lines if t["method"] == name and t.get("eval_loss") is not None]
        told = {f"{t['lr']:.2g} {t['eval_loss']:.2f}": None for t in sorted(tried, key=lambda t: t.get("lr") or 0)}
        rates = ("", "", "") if name == BASE else (f"{rate(name):.2g}", f"{line['lr']:.2g}", ", ".join(told))
        accuracy = "" if line.get("eval_accuracy") is None else f"{line['eval_accuracy']:.0%}"
        cells = (name, *rates[:2], f"{line['eval_loss']:.2f}", accuracy, rates[2])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
