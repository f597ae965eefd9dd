from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltatune.core.errors import DeltatuneError
from deltatune.data import DataError, load, read

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ç\nd", "completion": 'e, "f"'}]


def _lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(_lines(ROWS), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        path.write_text('prompt,completion\na,b\n"ç\nd","e, ""f"""\n', encoding="utf-8")
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "origins"),
    [
        ("x.json", ["x.json[0]", "x.json[1]"]),
        ("x.jsonl", ["x.jsonl:1", "x.jsonl:2"]),
        ("x.csv", ["x.csv:2", "x.csv:3"]),
        ("x.parquet", ["x.parquet[0]", "x.parquet[1]"]),
        ("folder", ["folder[0]", "folder[1]"]),
    ],
)
def test_every_kind_gives_the_same_rows_with_their_origin(tmp_path: Path, name: str, origins: list[str]) -> None:
    _write(tmp_path / name)
    rows = read(tmp_path / name)
    assert rows.rows == ROWS
    assert [origin.removeprefix(f"{tmp_path}/") for origin in rows.origins] == origins


def test_wrapped_list_and_lines_under_the_json_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "b.json").write_text(_lines(ROWS))
    assert read(tmp_path / "a.json").rows == read(tmp_path / "b.json").rows == ROWS


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    first, second = _lines(ROWS[:1]).encode(), _lines(ROWS[1:]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + first + b"\n  \n" + second)
    rows = read(tmp_path / "a.jsonl")
    assert rows.rows == ROWS and rows.origins[1].endswith(":4")


def test_all_bad_rows_are_reported_together_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(
        b'{"instruction": "a", "output": "b"}\n'
        b'{"instruction": "a", "output": \n'
        b'{"instruction": "caf\xe9", "output": "b"}\n'
        b"[1, 2]\n"
        b'{"instruction": "who", "input": ""}\n'
        b'{"instruction": "who", "output": 3}\n'
        b'{"instruction": "a", "output": "b"}\n'
    )
    with pytest.raises(DataError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert lines == caught.value.problems
    assert len(lines) == 5
    assert lines[0].startswith(f"{path}:2: not JSON (Expecting value at column")
    assert "byte 0xe9 at offset 88 is not UTF-8" in lines[1] and "UTF-8" in lines[1]
    assert path.read_bytes()[88] == 0xE9
    assert lines[2] == f"{path}:4: a row is an object with named fields, not a list: [1, 2]"
    assert lines[3] == f"{path}:5: field 'output' is missing: " + '{"instruction": "who", "input": ""}'
    assert lines[4].startswith(f"{path}:6: field 'output' is a number, not text")


def test_limit_and_shortened_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(_lines([{"prompt": "x" * 1000, "completion": None}] * 50))
    with pytest.raises(DataError) as caught:
        load(path)
    assert len(caught.value.problems) == 21 and "may be more" in caught.value.problems[-1]
    assert max(map(len, caught.value.problems)) < len(str(path)) + 250
    with pytest.raises(DataError) as caught:
        load(path, limit=100)
    assert len(caught.value.problems) == 50


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_encoding_names_the_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[\n1,\n\xff]")
    with pytest.raises(DataError, match=rf"{name}:3: byte 0xff at offset 5 is not UTF-8; save the file as UTF-8"):
        read(tmp_path / name)


def test_utf16_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(_lines(ROWS), encoding="utf-16")
        with pytest.raises(DataError, match=r":1: the text is UTF-16; save the file as UTF-8") as caught:
            read(tmp_path / name)
        assert len(caught.value.problems) == 1


def test_json_error_names_line_and_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(DataError, match=r'a\.json:3: not JSON .*: \{"a": \}'):
        read(tmp_path / "a.json")


def test_csv_row_of_another_width(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",x\na,b,c\n')
    with pytest.raises(DataError, match=r'a\.csv:4: 3 fields, but the header has 2: \["a", "b", "c"\]'):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(DataError, match="empty"):
        read(tmp_path / name)


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "contracts.jsonl").write_text("{}")
    with pytest.raises(DeltatuneError, match="no such file.*did you mean 'contracts.jsonl'"):
        read(tmp_path / "contract.jsonl")
    with pytest.raises(DeltatuneError, match="no folder"):
        read(tmp_path / "none" / "contract.jsonl")


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="unknown kind of file '.txt'"):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        read(tmp_path)
    (tmp_path / "a.parquet").write_text("hello")
    with pytest.raises(DataError, match="not a Parquet file"):
        read(tmp_path / "a.parquet")


def test_splits_and_class_names_of_a_datasets_folder(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {
        name: datasets.Dataset.from_dict({"text": [name], "label": [label]}, features=features)
        for name, label in (("train", 1), ("test", 0))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert read(tmp_path / "d").rows == [{"text": "train", "label": "yes"}]
    rows = read(tmp_path / "d", split="test")
    assert rows.rows == [{"text": "test", "label": "no"}] and rows.origins[0].endswith("d/test[0]")
    with pytest.raises(DataError, match="no split 'tests'; it has train, test; did you mean 'test'"):
        read(tmp_path / "d", split="tests")


def test_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        return datasets.DatasetDict(validation=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name:part").rows == ROWS
    assert asked == [("owner/name", "part")]

    def fail(name: str, config: str | None) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="neither a file here nor a data set.*offline"):
        read("owner/name")
