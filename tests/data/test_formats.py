from __future__ import annotations

import pytest

from deltatune.data import Conversation, DataError, Labelled, Pair, Preference, Rows, Tagged, Text, normalise, recognise


def _rows(*rows: dict) -> Rows:
    return Rows("f.jsonl", list(rows), [f"f.jsonl:{i}" for i in range(1, len(rows) + 1)])


def _user(text: str, answer: str, **extra: str) -> list[dict]:
    return [{"role": "user", "content": text, **extra}, {"role": "assistant", "content": answer}]


SYSTEM = {"role": "system", "content": "s"}
WEATHER = [{"type": "function", "function": {"name": "weather"}}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]


@pytest.mark.parametrize(
    ("row", "name", "item"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", Conversation(_user("q", "a"))),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            "alpaca",
            Conversation([SYSTEM, *_user("q\ni", "a", instruction="q", input="i")]),
        ),
        ({"prompt": "q", "completion": "a"}, "completion", Conversation(_user("q", "a"))),
        (
            {"prompt": _user("q", "a")[:1], "completion": _user("q", "a")[1:]},
            "completion",
            Conversation(_user("q", "a")),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "sharegpt",
            Conversation([SYSTEM, *_user("q", "a")]),
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": CALL, "name": None}], "tools": WEATHER},
            "messages",
            Conversation([{"role": "assistant", "content": None, "tool_calls": CALL}], WEATHER),
        ),
        ({"text": "t"}, "text", Text("t")),
        ({"text": "t", "label": "l"}, "classification", Labelled("t", "l")),
        ({"sentence1": "t", "sentence2": "u", "label": 1}, "classification", Labelled("t", 1, "u")),
        ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, "tagging", Tagged(["a", "b"], [0, 1])),
        ({"source": "s", "target": "t"}, "pairs", Pair("s", "t")),
        ({"input": "s", "output": "t"}, "pairs", Pair("s", "t")),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "preference",
            Preference(_user("q", "a")[:1], _user("q", "a")[1:], _user("q", "b")[1:]),
        ),
    ],
)
def test_recognised_by_columns(row: dict, name: str, item: object) -> None:
    rows = _rows(row)
    assert recognise(rows) == name
    data = normalise(rows)
    fields = {**vars(item), "origin": "f.jsonl:1"}
    assert vars(data.items[0]) == fields and type(data.items[0]) is type(item)


def test_most_rows_decide_and_the_others_are_bad() -> None:
    good = {"instruction": "q", "input": "i", "output": "a"}
    with pytest.raises(DataError) as caught:
        normalise(_rows(good, good, {"input": "i", "output": "a"}, {"instruction": "q", "text": "a"}))
    assert [line.split(": {")[0] for line in caught.value.problems] == [
        "f.jsonl:3: field 'instruction' is missing",
        "f.jsonl:4: field 'output' is missing",
    ]


def test_unknown_columns_list_columns_and_formats() -> None:
    with pytest.raises(DataError) as caught:
        normalise(_rows({"promt": "q", "answer": "a"}))
    text = str(caught.value)
    assert "the columns promt, answer fit no known format" in text
    assert "'promt'; did you mean 'prompt'?" in text
    assert "completion: prompt, completion" in text


def test_columns_and_format_override() -> None:
    row = {"question": "q", "coarse": "l", "text": "other"}
    columns = {"text": "question", "label": "coarse"}
    assert normalise(_rows(row), columns=columns).items == [Labelled("q", "l", origin="f.jsonl:1")]
    assert normalise(_rows(row), format="text").items == [Text("other", "f.jsonl:1")]
    with pytest.raises(DataError, match="no column 'coarce'.*did you mean 'coarse'"):
        normalise(_rows(row), columns={"label": "coarce"})
    with pytest.raises(DataError, match="no field 'lable'.*did you mean 'label'"):
        normalise(_rows(row), columns={"lable": "coarse"})
    with pytest.raises(DataError, match="unknown format 'alpacca'.*did you mean 'alpaca'"):
        normalise(_rows(row), format="alpacca")
    with pytest.raises(DataError, match="needs the fields instruction, output; the columns are question, coarse, text"):
        normalise(_rows(row), format="alpaca")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "has the role 'asistant'; did you mean 'assistant'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": ["hi"]}, r"messages\[0\] is text, not an object"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "field 'tools' is not JSON"),
        ({"text": "t", "label": 0.5}, "a class is a name or a whole number"),
        ({"text": "t", "label": None}, "field 'label' is null"),
        ({"tokens": ["a"], "tags": [1, 2]}, "1 tokens but 2 tags"),
        ({"tokens": [], "tags": []}, "field 'tokens' is empty"),
        ({"prompt": "q", "completion": None}, "field 'completion' is null"),
        ({"instruction": "q", "output": ["a"]}, "field 'output' is a list, not text"),
    ],
)
def test_what_is_wrong_with_a_row(row: dict, what: str) -> None:
    with pytest.raises(DataError, match=f"^f.jsonl:1: .*{what}"):
        normalise(_rows(row))
