"""Several methods on one base and one data set under one budget: `compare`. Each trains in a process of its own, so
that its peak memory is its own and its failure is one line.

comparison.jsonl   one line a method and learning rate, finished or failed; what is finished is not trained again
<method>/          its run: adapter, recipe, metrics, and `log.txt`, what it printed
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deltatune.core import DeltatuneError, attach
from deltatune.core.adapter import write_atomically
from deltatune.train import metrics
from deltatune.train.entrants import Entrant
from deltatune.train.recipe import FULL, Recipe

LINES, RESULT, LOG = "comparison.jsonl", "result.json", "log.txt"
TRIAL = 3  # steps that are timed where the budget is a time; the first is not counted
HELD_OUT = "5%"  # where the recipe has no evaluation data, which a comparison needs
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
Report = Callable[[str, int, int], None]  # method, step, steps


@dataclass(frozen=True)
class Budget:
    """What each method may use: seconds of training steps, optimizer steps, or tokens. One of them is set."""

    seconds: float | None = None
    steps: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, text: str) -> Budget:
        """`90s`, `2m`, `1h`, `500-steps`, `200k-tokens`, `1M-tokens`."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([smh])|([kM]?)[- ]?(steps?|tokens?))", text.strip())
        if found is None or not float(found[1]):
            raise DeltatuneError(f"budget: {text!r} is no budget; write 90s, 2m, 1h, 500-steps or 200k-tokens")
        number, unit, times, what = found.groups()
        if unit:
            return cls(seconds=float(number) * _UNITS[unit])
        count = math.ceil(float(number) * {"": 1, "k": 1e3, "M": 1e6}[times])
        return cls(steps=count) if what.startswith("step") else cls(tokens=count)

    def __str__(self) -> str:
        given = ((self.seconds, "s of training"), (self.steps, "steps"), (self.tokens, "tokens"))
        return next(f"{value:,.10g} {what}" for value, what in given if value is not None)


@dataclass(frozen=True)
class Row:
    """A method's line. `failed` is the reason why there are no numbers; sizes are bytes, `seconds` those of the steps.

    `merges`: whether the adapter can be written into the base; None where it is not known."""

    method: str
    lr: float | None
    key: str
    failed: str | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    trained: int | None = None
    file: int | None = None
    tokens_per_second: float | None = None
    peak: int | None = None
    merges: bool | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None


def recipe_for(recipe: Recipe, entrant: Entrant, budget: Budget, output: Path) -> Recipe:
    """`recipe` with the entrant's method, callbacks, learning rate and options of its own."""
    told = recipe.model_dump(mode="json", exclude={"train": {"seed"}}, exclude_unset=True)
    data = told["data"] | ({} if recipe.data.eval is not None else {"eval": HELD_OUT})
    kept = {k: v for k, v in told.get("train", {}).items() if k not in ("epochs", "max_steps", "lr", "seed")}
    steps = _steps(recipe, budget)
    ends = {"eval_every": steps, "save_every": steps}  # evaluation and checkpoints at the end alone
    train = ends | kept | dict(entrant.train) | {"max_steps": steps, "lr": entrant.lr, "log_every": 1}
    idle = FULL if recipe.quantize is None else "lora"  # of the base, which trains nothing; 4 bits cannot train whole
    mine = {"method": entrant.spec if entrant.trains else idle, "callbacks": list(entrant.callbacks)}
    return Recipe.of({**told, "data": data, "train": train, **mine, "output": str(output)})


def _steps(recipe: Recipe, budget: Budget) -> int:
    from deltatune.train.options import TOKENS_PER_STEP

    if budget.tokens is not None:
        if recipe.train.batch_size is not None:
            raise DeltatuneError("budget: tokens need steps of tokens; leave train.batch_size out, or give steps")
        return max(1, round(budget.tokens / (recipe.train.tokens_per_step or TOKENS_PER_STEP)))
    return budget.steps or TRIAL


def compare(recipe: Recipe, asked: Sequence[Entrant], budget: Budget, output: str | Path, *,
            report: Report | None = None, done: Callable[[Row], None] | None = None) -> list[Row]:  # fmt: skip
    """Trains each of `asked`; returns their rows, finished ones best first.

    What is finished in `output` is not trained again; what failed is. report: called while a method trains.
    Raises DeltatuneError when `output` holds a comparison of another base, data, options or budget."""
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows = {(row.method, row.lr): row for row in read(folder)}
    key = _key(recipe, budget)
    if other := next((row for row in rows.values() if row.key != key), None):
        raise DeltatuneError(
            f"output: {folder} holds a comparison of another recipe or budget ({other.method}); name another --output"
        )
    for entrant in asked:
        at = (entrant.name, entrant.lr)
        if at in rows and rows[at].failed is None:
            continue
        rows[at] = _trained(recipe, entrant, budget, folder, key, report)
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows.values())
        write_atomically(folder / LINES, lines.encode())
        if done is not None:
            done(rows[at])
    return ordered([rows[e.name, e.lr] for e in asked])


def best(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of one method at several learning rates the first; `rows` are in the order of `ordered`."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.method, row)
    return list(found.values())


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The best first: by accuracy where there is one, else by loss; what failed last."""

    def worse(row: Row) -> tuple[bool, float, float]:
        return row.failed is not None, -(row.eval_accuracy or 0.0), row.eval_loss or 0.0

    return sorted(rows, key=worse)


def read(folder: Path) -> list[Row]:
    path = folder / LINES
    try:
        return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise DeltatuneError(f"{path}: not a comparison ({error}); remove it, or name another --output") from error


def _key(recipe: Recipe, budget: Budget) -> str:
    """Of all that the methods have in common."""
    told = recipe.model_dump(mode="json", exclude={"method": True, "callbacks": True, "output": True, "train": {"lr"}})
    return hashlib.sha256(json.dumps([told, dataclasses.asdict(budget)], sort_keys=True).encode()).hexdigest()[:16]


def _trained(recipe: Recipe, entrant: Entrant, budget: Budget, folder: Path, key: str, report: Report | None) -> Row:
    home, name = folder / entrant.folder, entrant.name
    shutil.rmtree(home, ignore_errors=True)  # a run that was broken off
    home.mkdir()
    try:
        mine = recipe_for(recipe, entrant, budget, home / "run")
        found = _apart(
            mine, budget.seconds, home, entrant.trains, partial(report, name) if report is not None else None
        )
    except (DeltatuneError, TypeError) as error:
        found = {"failed": str(error)}
    if "failed" in found:
        found = {"failed": " ".join(found["failed"].split()).removeprefix(f"{name}: ")}
    return Row(name, entrant.lr, key, **found)


def _apart(recipe: Recipe, seconds: float | None, home: Path, trains: bool,
           report: Callable[[int, int], None] | None) -> dict[str, Any]:  # fmt: skip
    """What `train_one` finds in a process of its own; `failed` says how that ended if not well."""
    told = recipe.model_dump(mode="json", exclude={"train": {"seed"}}, exclude_unset=True)
    given = {"recipe": told, "seconds": seconds, "result": str(home / RESULT), "trains": trains}
    command = [sys.executable, "-m", "deltatune.train.compare"]
    same = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # imports what this process does
    with (home / LOG).open("wb") as log:
        child = subprocess.Popen(command, env=same, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError), child.stdin:  # it has ended, and says why in its log
                child.stdin.write(json.dumps(given).encode())
            for step, steps in _followed(child, home / "run"):
                if report is not None:
                    report(step, steps)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if (home / RESULT).is_file():
        return json.loads((home / RESULT).read_text(encoding="utf-8"))
    why = f"ended by signal {-child.returncode}" if child.returncode < 0 else f"ended with code {child.returncode}"
    killed = " (out of memory?)" if child.returncode == -signal.SIGKILL else ""
    last = (home / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return {"failed": ": ".join([why + killed, *last])}


def _followed(child: subprocess.Popen[bytes], run: Path) -> Iterator[tuple[int, int]]:
    """(step, steps) of the child's run, now and then, until it ends."""
    while True:
        try:
            child.wait(0.5)
            return
        except subprocess.TimeoutExpired:
            last = metrics.read(run / metrics.METRICS)[-1:]
            yield (last[0]["step"], last[0]["steps"]) if last else (0, 0)


def train_one(recipe: Recipe, seconds: float | None) -> dict[str, Any]:
    """Trains as `recipe` says, for so many seconds of steps if given; the numbers of a `Row`."""
    from deltatune.train.run import run

    if seconds is not None:
        recipe = _steps_set(recipe, max(1, int(seconds / _seconds_per_step(recipe))))
    outcome = run(recipe)
    records = outcome.result.history
    held_out = min((r for r in records if "eval_loss" in r), key=lambda r: r["eval_loss"])
    steps = _timed(records)
    tokens, spent = sum(r["tokens"] for r in steps), sum(r["tokens"] / r["tokens_per_second"] for r in steps)
    files = outcome.saved.glob("*.safetensors")
    trained = sum(p.numel() for p in _blank(outcome).parameters()) if outcome.plan is None else outcome.plan.trained
    return {
        "eval_loss": held_out["eval_loss"], "eval_accuracy": held_out.get("eval_accuracy"), "trained": trained,
        "file": sum(path.stat().st_size for path in files), "tokens_per_second": tokens / spent,
        "peak": outcome.peak, "merges": merges(outcome, recipe), "steps": outcome.result.step,
        "tokens": outcome.result.tokens, "seconds": outcome.result.tokens * spent / tokens,
    }  # fmt: skip


def untrained(recipe: Recipe) -> dict[str, Any]:
    """The quality of the base as it is, on the rows that the recipe holds out; its head, if it has one, is drawn."""
    from deltatune.train.batching import batches
    from deltatune.train.loss import evaluate
    from deltatune.train.run import prepare

    ready = prepare(recipe)
    assert ready.held_out is not None
    options, _ = ready.sized()
    rows = batches(ready.held_out, ready.tokenizer, options, ready.task, "none", ready.max_length, recipe.seed)
    found = evaluate(ready.load(), rows, ready.dtype)
    return {name: found.get(name) for name in ("eval_loss", "eval_accuracy")}


def _timed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of steps, without the first, in which much is done for the first time."""
    steps = [r for r in records if "tokens_per_second" in r]
    return steps[1:] or steps


def _seconds_per_step(recipe: Recipe) -> float:
    from deltatune.train.run import run

    with tempfile.TemporaryDirectory() as folder:
        trial = _steps_set(recipe, TRIAL).model_copy(update={"output": folder})
        steps = _timed(run(trial).result.history)
    return sum(r["tokens"] / r["tokens_per_second"] for r in steps) / len(steps)


def _steps_set(recipe: Recipe, steps: int) -> Recipe:
    had = recipe.train.max_steps  # an interval as long as the run stays so
    train = {"max_steps": steps} | {n: steps for n in ("eval_every", "save_every") if getattr(recipe.train, n) == had}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def merges(outcome: Any, recipe: Recipe) -> bool | None:
    """Whether the method can be merged; None where that takes the weights' values."""
    if (method := recipe.made_method()) is None:
        return None
    try:
        return attach(_blank(outcome), method).mergeable
    except (DeltatuneError, NotImplementedError, RuntimeError, TypeError):
        return None


def _blank(outcome: Any) -> Any:
    """The base that was trained on, without weights."""
    import torch
    import transformers

    from deltatune.models.loading import TASKS, read_config

    recipe = Recipe.read(outcome.output / "recipe.yaml")
    with torch.device("meta"):
        return getattr(transformers, TASKS[outcome.summary.task]).from_config(read_config(recipe.base))


def _main() -> None:
    given = json.loads(sys.stdin.read())
    try:
        asked = Recipe.of(given["recipe"])
        found = train_one(asked, given["seconds"]) if given["trains"] else untrained(asked)
    except DeltatuneError as error:
        found = {"failed": str(error)}
    write_atomically(Path(given["result"]), json.dumps(found).encode())


if __name__ == "__main__":
    _main()
