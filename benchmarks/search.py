"""The learning rate of every method, searched: see `benchmarks/rates.md`.

    python benchmarks/search.py trec.yaml rates.jsonl --steps 60 [--methods all] [--share 0/2]

From a method's present rate up, or down, by a half decade a trial for as long as the loss on held-out rows falls. Each
trial is a run as `deltatune compare` makes it, of so many steps, one line in the file; a line that is there is not run
again. `--share 0/2`: every second method, for two processes side by side. `--table` prints what the file says: of the
rates within 2 % of the best loss the smallest, since a short run likes larger rates than a long one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from deltatune.core import DeltatuneError
from deltatune.train.compare import Budget, recipe_for, train_one, untrained
from deltatune.train.entrants import BASE, entrants, methods, rate
from deltatune.train.recipe import Recipe

HALF_DECADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
CLOSE = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("rates", type=Path)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--start", type=float, default=1.0, choices=HALF_DECADES, help="a multiple of the present rate")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(_lines(given.rates)))
        return
    mine, of = map(int, given.share.split("/"))
    for name in methods(given.methods)[mine::of]:
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


def _trial(recipe: Recipe, name: str, factor: float, steps: int, rates: Path) -> dict[str, Any]:
    line: dict[str, Any] = {"method": name, "factor": factor, "steps": steps}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            (entrant,) = entrants([name], [factor] if name != BASE else [1.0])
            line["lr"] = entrant.lr
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
