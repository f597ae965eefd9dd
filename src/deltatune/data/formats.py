"""The shapes in which people keep rows, recognised by their columns and brought to a few normal forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deltatune.core.errors import nearest
from deltatune.data.readers import DataError, Problems, Row, Rows, _kind, read

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """``messages`` in OpenAI's form: ``{"role": …, "content": …}``; ``tools`` are JSON schemas."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    origin: str = ""


@dataclass(frozen=True)
class Text:
    text: str
    origin: str = ""


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, with its class: a name, or a number."""

    text: str
    label: str | int
    pair: str | None = None
    origin: str = ""


@dataclass(frozen=True)
class Tagged:
    """Words with one tag each."""

    tokens: list[str]
    tags: list[str | int]
    origin: str = ""


@dataclass(frozen=True)
class Pair:
    """A source sequence and its target, for an encoder-decoder."""

    source: str
    target: str
    origin: str = ""


@dataclass(frozen=True)
class Preference:
    """The same ``prompt`` answered twice; each is a list of messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    origin: str = ""


Item = Conversation | Text | Labelled | Tagged | Pair | Preference

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip


class _Bad(Exception):
    """What is wrong with one row."""


def _text(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise _Bad(f"field {name!r} is {_kind(row[name])}, not text")
    return row[name]


def _turns(value: Any, name: str, role: str = "user") -> list[Message]:
    """Messages out of OpenAI's or ShareGPT's form, or one message of ``role`` out of a plain text."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise _Bad(f"field {name!r} is {'empty' if value == [] else _kind(value)}, not a list of messages")
    messages = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _Bad(f"{name}[{index}] is {_kind(turn)}, not an object")
        said = turn.get("role", turn.get("from"))
        if said not in ROLES:
            raise _Bad(f"{name}[{index}] has the role {said!r}{nearest(str(said), ROLES)}")
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str | list) and not turn.get("tool_calls"):
            raise _Bad(f"{name}[{index}] has no content" if content is None else f"{name}[{index}].content is not text")
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
        messages.append({"role": ROLES[said], "content": content, **rest})
    return messages


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise _Bad(f"field 'tools' is not JSON ({error.msg})") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Bad("field 'tools' is not a list of JSON schemas")
    return tools or None


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []


def _alpaca(row: Row, origin: str) -> Item:
    instruction, answer = _text(row, "instruction"), _text(row, "output")
    extra = "" if row.get("input") is None else _text(row, "input")
    user: Message = {"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction}
    if extra:  # kept apart too, for templates that have a place for it
        user |= {"instruction": instruction, "input": extra}
    return Conversation([*_system(row), user, {"role": "assistant", "content": answer}], origin=origin)


def _messages(name: str, row: Row, origin: str) -> Item:
    return Conversation(_system(row) + _turns(row[name], name), _tools(row), origin)


def _completion(row: Row, origin: str) -> Item:
    parts = [_turns(row.get(name), name, role) for name, role in (("prompt", "user"), ("completion", "assistant"))]
    return Conversation(_system(row) + parts[0] + parts[1], _tools(row), origin)


def _preference(row: Row, origin: str) -> Item:
    chosen, rejected = (_turns(row.get(name), name, "assistant") for name in ("chosen", "rejected"))
    return Preference(_system(row) + _turns(row.get("prompt"), "prompt"), chosen, rejected, origin)


def _label(value: Any, name: str) -> str | int:
    if isinstance(value, str | int):
        return int(value) if isinstance(value, bool) else value
    raise _Bad(f"{name} is {_kind(value)}; a class is a name or a whole number")


def _classification(row: Row, origin: str) -> Item:
    pair = _text(row, "text_pair") if row.get("text_pair") is not None else None
    return Labelled(_text(row, "text"), _label(row.get("label"), "field 'label'"), pair, origin)


def _list(row: Row, name: str) -> list[Any]:
    if not isinstance(row[name], list) or not row[name]:
        raise _Bad(f"field {name!r} is {'empty' if row[name] == [] else _kind(row[name])}, not a list")
    return row[name]


def _tagging(row: Row, origin: str) -> Item:
    tokens, tags = _list(row, "tokens"), _list(row, "tags")
    if len(tokens) != len(tags) or not all(isinstance(token, str) for token in tokens):
        raise _Bad(f"{len(tokens)} tokens but {len(tags)} tags" if len(tokens) != len(tags) else "a token is not text")
    return Tagged(tokens, [_label(tag, f"tags[{i}]") for i, tag in enumerate(tags)], origin)


def _pair(row: Row, origin: str) -> Item:
    return Pair(_text(row, "source"), _text(row, "target"), origin)


def _plain(row: Row, origin: str) -> Item:
    return Text(_text(row, "text"), origin)


@dataclass(frozen=True)
class Format:
    """``required`` and ``optional`` fields; each tuple holds the field's name, then other names it is known by."""

    convert: Callable[[Row, str], Item]
    required: tuple[tuple[str, ...], ...]
    optional: tuple[tuple[str, ...], ...] = ()

    def fits(self, row: Row) -> bool:
        return all(any(name in row for name in names) for names in self.required)

    def rename(self, row: Row) -> Row:
        """The row with every field under its own name, where the row calls it otherwise."""
        every = self.required + self.optional
        found = {names[0]: row[name] for names in every for name in reversed(names) if name in row}
        return {**row, **found}


# From the most particular columns to the least: the first that fits most rows is taken.
FORMATS: dict[str, Format] = {
    "preference": Format(_preference, (("prompt", "question"), ("chosen",), ("rejected",)), (("system",),)),
    "messages": Format(partial(_messages, "messages"), (("messages",),), (("system",), ("tools",))),
    "sharegpt": Format(partial(_messages, "conversations"), (("conversations", "conversation"),),
                       (("system",), ("tools",))),
    "alpaca": Format(_alpaca, (("instruction",), ("output", "response")),
                     (("input", "context"), ("system",))),
    "completion": Format(_completion, (("prompt",), ("completion", "response")), (("system",), ("tools",))),
    "tagging": Format(_tagging, (("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels"))),
    "classification": Format(
        _classification,
        (("text", "sentence", "sentence1", "premise", "question1"), ("label", "labels")),
        (("text_pair", "sentence2", "hypothesis", "question2"),),
    ),
    "pairs": Format(_pair, (("source", "input"), ("target", "output"))),
    "text": Format(_plain, (("text", "content"),)),
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """Items of one normal form, in the order of the file; ``adapters``, by origin, are those that the rows name."""

    source: str
    format: str
    items: list[Item]
    adapters: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)


def recognise(rows: Rows) -> str:
    """The name of the first format that fits at least half of the rows, else of the one that fits most.

    Raises `DataError` listing the columns and the formats when none fits a single row."""
    counts = {name: sum(map(known.fits, rows.rows)) for name, known in FORMATS.items()}
    half = [name for name, count in counts.items() if 2 * count >= len(rows)]
    best = half[0] if half else max(counts, key=counts.__getitem__)
    if not counts[best]:
        raise DataError(_unknown(rows))
    return best


def normalise(
    rows: Rows,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int = 20,
    problems: Problems | None = None,
) -> Dataset:
    """Rows brought to their normal form; ``format`` overrides what the columns say.

    ``columns`` maps a field of the format to the column that holds it, ``{"text": "question"}``. Raises one
    `DataError` naming up to ``limit`` bad rows (with those already in ``problems``)."""
    found = problems if problems is not None else Problems(limit)
    if not rows.rows:
        found.done()
    if format is not None and format not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"{rows.source}: unknown format {format!r} (known: {known}){nearest(format, FORMATS)}")
    if columns:
        rows = _mapped(rows, columns, [FORMATS[format]] if format else list(FORMATS.values()))
    name = format or recognise(rows)
    chosen = FORMATS[name]
    if not any(map(chosen.fits, rows.rows)):
        fields = ", ".join(names[0] for names in chosen.required)
        raise DataError(
            f"{rows.source}: format {name!r} needs the fields {fields}; the columns are {', '.join(rows.columns)}. "
            f"Say which column holds which field with columns, such as {{{chosen.required[0][0]}: {rows.columns[0]}}}"
        )
    items, adapters = [], {}
    for origin, row in rows:
        renamed = chosen.rename(row)
        try:
            for names in chosen.required:
                if names[0] not in renamed:
                    raise _Bad(f"field {names[0]!r} is missing")
            if row.get("adapter") is not None:
                adapters[origin] = _text(row, "adapter")
            items.append(chosen.convert(renamed, origin))
        except _Bad as bad:
            found.add(origin, str(bad), row)
    found.done()
    return Dataset(rows.source, name, items, adapters)


def load(
    source: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int = 20,
) -> Dataset:
    """`read` and `normalise` in one, so that unreadable and ill-formed rows are reported together."""
    problems = Problems(limit)
    rows = read(source, split=split, problems=problems)
    return normalise(rows, format=format, columns=columns, problems=problems)


def _mapped(rows: Rows, columns: Mapping[str, str], formats: list[Format]) -> Rows:
    fields = sorted({names[0] for known in formats for names in known.required + known.optional})
    asked = [("field", field, fields) for field in columns]
    for kind, name, known in asked + [("column", column, rows.columns) for column in columns.values()]:
        if name not in known:
            near = nearest(name, known)
            raise DataError(f"{rows.source}: columns: no {kind} {name!r}, only {', '.join(known)}{near}")
    mapped = []
    for row in rows.rows:
        rest = {k: v for k, v in row.items() if k not in columns.values()}
        mapped.append(rest | {field: row[column] for field, column in columns.items() if column in row})
    return Rows(rows.source, mapped, rows.origins)


def _unknown(rows: Rows) -> str:
    fields = {name for known in FORMATS.values() for names in known.required for name in names}
    hints = [f"\n  {column!r}{nearest(column, fields, 1)}" for column in rows.columns if nearest(column, fields)]
    known = [f"\n  {name}: {', '.join(names[0] for names in each.required)}" for name, each in FORMATS.items()]
    return (
        f"{rows.source}: the columns {', '.join(rows.columns)} fit no known format.{''.join(hints)}\nKnown formats and "
        f"their fields:{''.join(known)}\nSet columns to say which column holds which field, such as {{text: question}}"
    )
