"""Rows out of files, each with its origin; what cannot be read is collected and reported together."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from deltatune.core.errors import DeltatuneError, nearest

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class DataError(DeltatuneError):
    """Bad rows, one line each: ``file.jsonl:137: field 'output' is missing: {"instruction": …}``."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


@dataclass
class Problems:
    """Bad rows collected up to ``limit``; reaching it raises at once, `done` raises what there is."""

    limit: int = 20
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, origin: str, what: str, row: Any = None) -> None:
        self.found.append((origin, f"{what}: {shorten(row)}" if row is not None else what))
        if len(self.found) >= self.limit:
            self.done(f"stopped after {self.limit} bad rows; there may be more")

    def done(self, *more: str) -> None:
        """Raises one `DataError` with every bad row, if there is any."""
        if self.found:
            raise DataError(*(f"{origin}: {what}" for origin, what in self.found), *more)


@dataclass(frozen=True)
class Rows:
    """Rows as read: ``origins[i]`` says where ``rows[i]`` came from (``file.jsonl:137`` or ``file.parquet[12]``)."""

    source: str
    rows: list[Row]
    origins: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return iter(zip(self.origins, self.rows, strict=True))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(chain.from_iterable(self.rows)))


def read(source: str | Path, *, split: str | None = None, limit: int = 20, problems: Problems | None = None) -> Rows:
    """Reads ``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``, a folder saved by `datasets`, or a hub name.

    ``split`` names a split of a `datasets` folder or hub data set (default ``train``, or the only one); a hub name
    may carry a configuration, ``glue:sst2``. Raises `DataError` with up to ``limit`` bad rows; given ``problems``,
    bad rows are added there instead, so that a caller can report them with its own.
    """
    path = Path(source).expanduser()
    found = problems if problems is not None else Problems(limit)
    if path.is_dir():
        pairs = _folder(path, split)
    elif not path.exists():
        pairs = _hub(str(source), split)
    elif path.suffix not in SUFFIXES:
        raise DataError(f"{source}: unknown kind of file {path.suffix!r}; known are {', '.join(SUFFIXES)}")
    else:
        pairs = {".json": _json, ".jsonl": _lines, ".parquet": _parquet}.get(path.suffix, _csv)(path, found)
    rows = list(pairs)
    if problems is None:
        found.done()
    if not rows and not found.found:
        raise DataError(f"{source}: no rows; the file is empty")
    return Rows(str(source), [row for _, row in rows], [origin for origin, _ in rows])


def shorten(row: Any, width: int = 160) -> str:
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= width else text[: width - 1] + "…"


class _NotUtf8(ValueError):
    def __init__(self, offset: int, what: str) -> None:
        self.offset = offset
        super().__init__(f"{what}; save the file as UTF-8 (iconv -f {'UTF-16' if '16' in what else 'LATIN1'} -t UTF-8)")


def _decode(raw: bytes, offset: int = 0) -> str:
    """UTF-8, with or without a byte order mark; ``offset`` is where ``raw`` begins in the file."""
    if raw[:2] in _UTF16:
        raise _NotUtf8(0, "the text is UTF-16")
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at = error.start
        raise _NotUtf8(at, f"byte 0x{raw[at]:02x} at offset {offset + at} is not UTF-8") from None


def _lines(path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            origin = f"{path}:{number}"
            try:
                text = _decode(raw, offset)
                if text.strip():
                    yield from _checked(origin, json.loads(text), problems)
            except json.JSONDecodeError as error:
                problems.add(origin, f"not JSON ({error.msg} at column {error.colno})", text.strip())
            except _NotUtf8 as error:
                problems.add(origin, str(error))
                if raw[:2] in _UTF16:
                    return
            offset += len(raw)


def _json(path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    raw = path.read_bytes()
    if not raw.strip():
        return
    try:
        value = json.loads(_decode(raw))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the wrong suffix, as many hub files are
            yield from _lines(path, problems)
        else:
            shown = "".join(error.doc.splitlines()[error.lineno - 1 : error.lineno])
            problems.add(f"{path}:{error.lineno}", f"not JSON ({error.msg} at column {error.colno})", shown)
        return
    except _NotUtf8 as error:
        line = raw.count(b"\n", 0, error.offset) + 1
        problems.add(f"{path}:{line}", str(error))
        return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(f'{path}: expected a list of objects or {{"data": [...]}}, found {_kind(value)}')
    for index, row in enumerate(value):
        yield from _checked(f"{path}[{index}]", row, problems)


def _checked(origin: str, row: Any, problems: Problems) -> Iterator[tuple[str, Row]]:
    if isinstance(row, dict):
        yield origin, row
    else:
        problems.add(origin, f"a row is an object with named fields, not {_kind(row)}", row)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _csv(path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    raw = path.read_bytes()
    try:
        text = _decode(raw)
    except _NotUtf8 as error:
        line = raw.count(b"\n", 0, error.offset) + 1
        problems.add(f"{path}:{line}", str(error))
        return
    reader = csv.reader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    line = 1
    header: list[str] | None = None
    try:
        for cells in reader:
            origin, line = f"{path}:{line}", reader.line_num + 1
            if header is None:
                header = cells
            elif len(cells) == len(header):
                yield origin, dict(zip(header, cells, strict=True))
            elif cells:
                problems.add(origin, f"{len(cells)} fields, but the header has {len(header)}", cells)
    except csv.Error as error:
        problems.add(f"{path}:{line}", f"not CSV ({error})")


def _parquet(path: Path, problems: Problems) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        table = pq.read_table(path)
    except ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from None
    for index, row in enumerate(table.to_pylist()):
        yield f"{path}[{index}]", row


def _folder(path: Path, split: str | None) -> Iterator[tuple[str, Row]]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        inside = [entry.name for entry in sorted(path.iterdir()) if entry.suffix in SUFFIXES]
        hint = f"name one of its files: {', '.join(inside)}" if inside else "it holds no data file either"
        raise DataError(f"{path}: not a folder saved by datasets (save_to_disk); {hint}")
    import datasets

    return _dataset(str(path), datasets.load_from_disk(str(path)), split)


def _hub(name: str, split: str | None) -> Iterator[tuple[str, Row]]:
    path = Path(name)
    if path.suffix in SUFFIXES or not _HUB_NAME.fullmatch(name):
        folder = path.expanduser().parent
        if not folder.is_dir():
            raise DataError(f"{name}: no such file, and no folder {str(folder)!r} either")
        near = nearest(path.name, [entry.name for entry in folder.iterdir()])
        raise DataError(f"{name}: no such file in {str(folder)!r}{near}")
    import datasets

    dataset, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, config or None)
    except Exception as error:  # the hub client raises its transport's many kinds
        near = nearest(name, [entry.name for entry in Path(".").iterdir()])
        raise DataError(f"{name}: neither a file here{near} nor a data set that the hub gives ({error})") from error
    return _dataset(name, loaded, split)


def _dataset(source: str, loaded: Any, split: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    parts = list(loaded) if isinstance(loaded, datasets.DatasetDict) else []
    if parts and split is None:
        split = parts[0] if len(parts) == 1 else "train"
    if split is not None:
        if split not in parts:
            has = f"it has {', '.join(parts)}" if parts else "it is not divided into splits"
            raise DataError(f"{source}: no split {split!r}; {has}{nearest(split, parts)}")
        source, loaded = f"{source}/{split}", loaded[split]
    names = {k: v.names for k, v in loaded.features.items() if isinstance(v, datasets.ClassLabel)}
    for index, row in enumerate(loaded):
        for column, labels in names.items():
            if isinstance(row[column], int) and 0 <= row[column] < len(labels):
                row[column] = labels[row[column]]
        yield f"{source}[{index}]", row
