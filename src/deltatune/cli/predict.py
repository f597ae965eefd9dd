"""`deltatune predict`: classes of texts, or tags of words, under one or several adapters with their heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deltatune.cli import session as shared
from deltatune.cli.session import named, opened
from deltatune.core import DeltatuneError, adapters
from deltatune.core.adapter import write_atomically
from deltatune.data.formats import FORMATS
from deltatune.data.readers import Problems, read
from deltatune.serve import Prediction, classify_each
from deltatune.train.merged import TASKS

Row = dict[str, Any]


def command(
    base: shared.Base = None,
    adapter: shared.Adapters = None,
    text: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    file: Annotated[str | None, typer.Option(help="Rows with text (and text_pair), or tokens.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write rows with what is predicted here, as jsonl.")] = None,
    as_json: shared.Json = False,
    batch_size: Annotated[int, typer.Option(help="Texts at once.", min=1)] = 32,
    max_length: Annotated[int | None, typer.Option(help="Longer texts are cut, in tokens.", min=1)] = None,
    dtype: shared.Dtype = "auto",
) -> None:
    """Classify texts, or tag words, under each adapter; says how many are right where rows have a label or tags."""
    if bool(text) == bool(file):
        raise typer.BadParameter("give either --text or --file")
    if output is not None and not output.parent.is_dir():
        raise DeltatuneError(f"output: there is no folder {output.parent}")
    if not adapter:
        raise DeltatuneError("predict needs --adapter: the head that tells classes apart is saved with it")
    folders = named(adapter)
    task = task_of(folders)
    asked = [{"text": t} for t in text or []] if file is None else read_rows(file, task)
    if text and task == "tagging":
        asked = [{"tokens": t.split()} for t in text]
    model, tokenizer = opened(base, folders, task, dtype=dtype)
    length = max_length or min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 20))
    rows: list[Row] = []
    given = [_given(row, task) for row in asked]
    names = list(adapters(model))
    found = list(classify_each(model, tokenizer, given, names, batch_size=batch_size, max_length=length))
    for name in names:
        rows += [_predicted(row, name, told[name], task) for row, told in zip(asked, found, strict=True)]
    _show(rows, task, output, as_json)


def task_of(folders: dict[str, Path]) -> str:
    """What the adapters, all of them, were trained for: classification or tagging."""
    tasks: dict[str, str] = {}
    for name, folder in folders.items():
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
        if (task := TASKS.get(told, "")) not in ("classification", "tagging"):
            raise DeltatuneError(f"adapter: {folder} is for {task or 'no known task'}, not for classes; see: generate")
        tasks[name] = task
    if len(set(tasks.values())) > 1:
        raise DeltatuneError(f"adapter: {', '.join(f'{n} is for {t}' for n, t in tasks.items())}; give one kind")
    return next(iter(tasks.values()))


def read_rows(file: str, task: str) -> list[Row]:
    """The rows, with `text` or `tokens` under that name; bad rows are told together."""
    problems, found = Problems(), []
    wanted = "tokens" if task == "tagging" else "text"
    for origin, row in read(file, problems=problems):
        renamed = FORMATS[task].rename(row)
        value = renamed.get(wanted)
        right = isinstance(value, str) if wanted == "text" else isinstance(value, list) and bool(value)
        if right and isinstance(renamed.get("text_pair"), str | None):
            found.append(renamed)
        else:
            problems.add(
                origin, f"field {wanted!r} ({'text' if wanted == 'text' else 'a list of words'}) is missing", row
            )
    problems.done()
    return found


def _given(row: Row, task: str) -> Any:
    if task == "tagging":
        return row["tokens"]
    return row["text"] if row.get("text_pair") is None else (row["text"], row["text_pair"])


def _predicted(row: Row, name: str, found: Prediction, task: str) -> Row:
    if isinstance(found.label, list):
        return {**row, "adapter": name, "predicted": found.label}
    return {**row, "adapter": name, "predicted": found.label, "probability": round(float(found.probability), 4)}  # type: ignore[arg-type]


def _show(rows: list[Row], task: str, output: Path | None, as_json: bool) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if output is not None:
        write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
    if as_json:
        return typer.echo("\n".join(lines))
    if output is not None:
        typer.echo(f"{output}: {len(rows):,} predictions")
    else:
        table = Table("adapter", "predicted", "" if task == "tagging" else "probability", "text", box=None)
        for row in rows:
            words = row.get("tokens")
            told = " ".join(f"{w}/{t}" for w, t in zip(words, row["predicted"], strict=True)) if words else None
            table.add_row(row["adapter"], "" if told else row["predicted"],
                          "" if told else f"{row['probability']:.3f}", told or row["text"])  # fmt: skip
        Console(soft_wrap=True, highlight=False).print(table)
    for name in dict.fromkeys(row["adapter"] for row in rows):
        right = [pair for row in rows if row["adapter"] == name for pair in _pairs(row)]
        if right:
            share = sum(right) / len(right)
            typer.echo(f"{name}: {sum(right):,} of {len(right):,} right ({share:.1%})")


def _pairs(row: Row) -> list[bool]:
    """Whether each class or tag that the row tells is the one predicted."""
    if row.get("tags") is not None:
        return [str(a) == b for a, b in zip(row["tags"], row["predicted"], strict=False)]
    return [] if row.get("label") is None else [str(row["label"]) == row["predicted"]]
