"""`deltatune data`: look at data before training on it."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from deltatune.core.errors import DeltatuneError
from deltatune.data import IGNORED, DataError, Encoded, Example, build, load

app = typer.Typer(help="Check a data file, or show what the model is trained on.", no_args_is_help=True)

File = Annotated[str, typer.Argument(help="A json, jsonl, csv or parquet file, a datasets folder, or a hub name.")]
Format = Annotated[str | None, typer.Option(help="The rows' format, where the columns do not say it.")]
Column = Annotated[list[str] | None, typer.Option(help="field=column: which column holds a field; may be repeated.")]
Split = Annotated[str | None, typer.Option(help="The split of a datasets folder or hub data set.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def check(
    file: File,
    format: Format = None,
    column: Column = None,
    split: Split = None,
    limit: Annotated[int, typer.Option(help="Stop after so many bad rows.")] = 20,
    as_json: Json = False,
) -> None:
    """Read every row; print what the file holds, or every bad row (exit code 1)."""
    try:
        data = load(file, format=format, columns=_columns(column), split=split, limit=limit)
    except DataError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"ok": False, "file": file, "problems": error.problems}, ensure_ascii=False))
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"ok": True, "file": file, "format": data.format, "rows": len(data), "problems": []}))
    else:
        typer.echo(f"{file}: {len(data):,} rows, all good; format {data.format}")


@app.command()
def show(
    file: File,
    base: Annotated[str, typer.Option(help="The model or tokenizer folder (or hub name) whose tokens are shown.")],
    n: Annotated[int, typer.Option("-n", help="How many rows.", min=1)] = 3,
    format: Format = None,
    column: Column = None,
    split: Split = None,
    template: Annotated[str | None, typer.Option(help="chat, human-assistant, alpaca or a Jinja file.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut rows to so many tokens.", min=1)] = None,
    task: Annotated[str | None, typer.Option(help="causal, seq2seq, classification or tagging.")] = None,
    train_on: Annotated[str, typer.Option(help="response or all.")] = "response",
    as_json: Json = False,
) -> None:
    """Print rows as the model sees them; the tokens that carry the loss are green."""
    for name, value, known in (("task", task, _TASKS), ("train-on", train_on, ("response", "all"))):
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=f"--{name}")
    data = load(file, format=format, columns=_columns(column), split=split)
    tokenizer = _tokenizer(base)
    encoded = build(
        data, tokenizer, task=task, template=template, max_length=max_length, train_on=train_on  # type: ignore[arg-type]
    )  # fmt: skip
    shown = encoded.examples[:n]
    if as_json:
        rows = [_row(example, tokenizer) for example in shown]
        typer.echo(json.dumps({"summary": vars(encoded.summary), "rows": rows}, ensure_ascii=False))
        return
    console = Console(highlight=False, soft_wrap=True)
    for example in shown:
        counts = f"{len(example.input_ids)} tokens, {example.trained} trained"
        console.print(Text(f"── {example.origin}  {counts}", style="dim"))
        console.print(_coloured(example, tokenizer, encoded))
    console.print(Text(str(encoded.summary), style="bold"))


_TASKS = ("causal", "seq2seq", "classification", "tagging")


def _columns(options: list[str] | None) -> dict[str, str]:
    pairs = [option.partition("=") for option in options or []]
    for field, equals, column in pairs:
        if not (field and equals and column):
            raise typer.BadParameter(f"{field!r} is not of the form field=column", param_hint="--column")
    return {field: column for field, _, column in pairs}


def _tokenizer(base: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise DeltatuneError(f"base: no tokenizer in {base!r} ({str(error).splitlines()[0]})") from error


def _row(example: Example, tokenizer: Any) -> dict[str, Any]:
    return {
        "origin": example.origin,
        "text": tokenizer.decode(example.input_ids),
        "input_ids": example.input_ids,
        "labels": example.labels,
        "trained": example.trained,
    }


def _coloured(example: Example, tokenizer: Any, encoded: Encoded) -> Text:
    task = encoded.summary.task
    text = Text()
    if task in ("classification", "seq2seq"):
        text.append(tokenizer.decode(example.input_ids))
        answer = tokenizer.decode(example.labels) if task == "seq2seq" else encoded.id2label[example.labels[0]]
        return text.append("\n→ ").append(answer, style="green")
    pairs = zip(example.input_ids, example.labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text.append(tokenizer.decode([token for token, _ in run]), style="green" if trained else "")
    return text
