"""`deltatune train`: what a recipe says, from data to a saved adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from deltatune.train.metrics import progress_bar
from deltatune.train.recipe import Recipe
from deltatune.train.run import Outcome, run

File = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="In place of the recipe's: train.lr=1e-4, or lr=1e-4."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def command(
    recipe: File,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the output folder stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as RECIPE says, into its output: the adapter, the recipe in full, metrics, checkpoints."""
    overrides = overrides or []
    resume = resume or "resume=true" in overrides
    read = Recipe.read(recipe, [override for override in overrides if override != "resume=true"])
    with nullcontext(_silent) if as_json else progress_bar() as report:
        outcome = run(read, resume=resume, report=report)
    typer.echo(json.dumps(told(outcome)) if as_json else "\n".join([*summary(outcome), *following(outcome)]))


def told(outcome: Outcome) -> dict[str, Any]:
    """What a program wants to know of a run."""
    result, estimate = outcome.result, outcome.estimate
    return {
        "output": str(outcome.output), "saved": str(outcome.saved), "step": result.step, "steps": result.steps,
        "kept": result.kept, "loss": result.loss, "best": result.best, "tokens": result.tokens,
        "seconds": round(result.seconds, 3), "stopped_early": result.stopped_early, "packing": outcome.packing,
        "trained_parameters": outcome.plan and outcome.plan.trained,
        "memory": {"peak": outcome.peak, "estimate": estimate and estimate.to_dict()},
    }  # fmt: skip


def summary(outcome: Outcome) -> list[str]:
    result = outcome.result
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    held_out = (
        ""
        if result.best is None
        else f", least evaluation loss {result.best['eval_loss']:.4f} at step {result.best['step']}"
    )
    speed = result.tokens / max(result.seconds, 1e-9)
    return [
        f"{result.step:,} steps, {result.tokens:,} tokens in {result.seconds:,.0f} s ({speed:,.0f} tokens/s)"
        f"{loss}{held_out}",
        f"saved {outcome.saved}",
    ]


def following(outcome: Outcome) -> list[str]:
    """What to type next."""
    if outcome.summary.task not in ("causal", "seq2seq"):
        return []
    if outcome.plan is None:
        return ["next:", f"  deltatune chat {outcome.saved}"]
    merged = outcome.output.with_name(f"{outcome.output.name}-merged")
    return [
        "next:",
        f"  deltatune chat --adapter {outcome.saved} --compare",
        f"  deltatune merge --adapter {outcome.saved} --output {merged}",
    ]


def _silent(record: Mapping[str, Any]) -> None:
    """The result is the only thing printed."""
