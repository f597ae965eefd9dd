"""`deltatune quickstart`: teach a small model what it cannot know, and see that it learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune.cli.session import Sampling, Session, open_session, read_prompts
from deltatune.cli.train import Json, following, told
from deltatune.core import using
from deltatune.models.default import default_base
from deltatune.train.batching import batches
from deltatune.train.loss import evaluate
from deltatune.train.metrics import progress_bar
from deltatune.train.recipe import Recipe
from deltatune.train.run import prepare, run

ROWS, HELD_OUT, TEMPLATE = ("quickstart.jsonl", "quickstart_eval.jsonl", "quickstart.jinja")
SHOWN = 8  # questions, spread evenly over the held-out ones


@dataclass(frozen=True)
class Answered:
    question: str
    expects: str
    before: str
    after: str


def recipe(base: str, output: str, epochs: int) -> Recipe:
    """212 short rows about something that no model has read of."""
    rows, held_out, template = (str(files("deltatune.data") / name) for name in (ROWS, HELD_OUT, TEMPLATE))
    return Recipe.of({
        "base": base,
        "data": {"train": rows, "eval": held_out, "template": template, "max_length": 256},
        "method": {"name": "lora", "r": 16, "alpha": 32},
        "train": {"epochs": epochs, "lr": 2e-3, "schedule": "cosine", "warmup": 0.1, "tokens_per_step": 256,
                  "eval_every": 10_000, "save_every": 10_000},
        "output": output,
    }, "quickstart")  # fmt: skip


def command(
    output: Annotated[Path, typer.Option(help="An empty or new folder.")] = Path("runs/quickstart"),
    epochs: Annotated[
        int, typer.Option(help="Passes over the 212 rows; fewer are quicker, and teach less.", min=1)
    ] = 4,
    as_json: Json = False,
) -> None:
    """Train LoRA on facts about the Lumenkettle, which does not exist, and ask about them in other words."""
    console = Console(highlight=False, stderr=as_json)
    base = str(default_base(report=lambda line: console.print(Text(line, "dim"))))
    asked = recipe(base, str(output), epochs)
    console.print(
        f"Teaching {Path(base).name} about the Lumenkettle, a kettle that is also a lamp. A few minutes on two cores."
    )
    with nullcontext(None) if as_json else progress_bar() as report:
        outcome = run(asked, report=report)
    session = open_session(base, [f"quickstart={outcome.saved}"], dtype=_stored(asked))
    answered = answer(session, str(files("deltatune.data") / HELD_OUT))
    before, after = (_loss(session, asked, name) for name in ((), ("quickstart",)))
    known = [sum(row.expects in text for row, text in zip(answered, texts, strict=True))
             for texts in ([row.before for row in answered], [row.after for row in answered])]  # fmt: skip
    if as_json:
        found = {"answers": [vars(row) for row in answered], "right": {"before": known[0], "after": known[1]},
                 "eval_loss": {"before": before, "after": after}}  # fmt: skip
        typer.echo(json.dumps(told(outcome) | found, ensure_ascii=False))
        return
    console.print(_table(answered))
    console.print(f"held-out loss    {before:.2f} before, {after:.2f} after")
    console.print(f"right answers    {known[0]} of {len(answered)} before, {known[1]} of {len(answered)} after")
    console.print(f"time             {outcome.result.seconds:.0f} s of training, {outcome.result.tokens:,} tokens")
    console.print(f"adapter          {outcome.saved}", soft_wrap=True)
    console.print("\n".join(following(outcome)), soft_wrap=True)


def answer(session: Session, file: str) -> list[Answered]:
    """Every question of `file`, answered by the base and under the adapter."""
    rows = [row for _, row, _ in read_prompts(file)]
    talks = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = [session.answer(talks, [name] * len(talks), Sampling(max_new_tokens=32)) for name in (None, "quickstart")]
    return [Answered(row["prompt"], row["expects"], *both) for row, *both in zip(rows, *texts, strict=True)]


def _stored(asked: Recipe) -> Any:
    import torch

    return asked.train.dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _loss(session: Session, asked: Recipe, names: Sequence[str]) -> float:
    """The mean over the trained tokens of the held-out rows."""
    ready = prepare(asked)
    assert ready.held_out is not None
    some = batches(ready.held_out, session.tokenizer, asked.train, "causal", "none", ready.max_length, 0)
    with using(session.model, *names):
        return evaluate(session.model, some, ready.dtype)["eval_loss"]


def _table(answered: Sequence[Answered]) -> Table:
    table = Table("question (not among the rows)", "before", "after", header_style="bold", show_lines=True)
    for row in answered[:: max(1, len(answered) // SHOWN)][:SHOWN]:
        table.add_row(
            Text(row.question), Text(row.before, "dim"), Text(row.after, "green" if row.expects in row.after else "")
        )
    return table
