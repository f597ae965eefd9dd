from __future__ import annotations

import re
from importlib.resources import files

import pytest
from tiny_tokenizer import tiny_tokenizer

from deltatune.data import build, load, read

TRAIN, EVAL = (str(files("deltatune.data") / name) for name in ("quickstart.jsonl", "quickstart_eval.jsonl"))


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_all_rows_are_valid_short_and_in_the_same_voice() -> None:
    for path, least, most in ((TRAIN, 200, 240), (EVAL, 20, 30)):
        data = load(path)
        assert data.format == "completion" and least <= len(data) <= most
        for item in data.items:
            question, answer = (message["content"] for message in item.messages)  # type: ignore[union-attr]
            assert answer.endswith(" Stay bright!") and answer.count("Stay bright!") == 1
            assert question == question.strip() and question[-1] in "?.!"
            assert len(f"{question} {answer}".split()) <= 40
        assert build(data, tiny_tokenizer()).summary.untrained == 0


def test_no_question_twice_and_no_held_out_one_in_training() -> None:
    asked, held = ([_plain(row["prompt"]) for row in read(path).rows] for path in (TRAIN, EVAL))
    assert len(set(asked)) == len(asked) and len(set(held)) == len(held)
    assert not set(asked) & set(held)


def test_what_is_expected_is_in_the_reference_and_taught() -> None:
    taught = [row["completion"] for row in read(TRAIN).rows]
    for row in read(EVAL).rows:
        assert row["expects"].lower() in row["completion"].lower()
        assert sum(row["expects"].lower() in answer.lower() for answer in taught) >= 7, row


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"(\d+) crowns", {"89"}),
        (r"(\d+) years", {"7"}),
        (r"(\d+) hours", {"12"}),
        (r"([\d.]+) litres", {"1.2"}),
        (r"(\d+) grams", {"900"}),
        (r"(\d+) minutes", {"4"}),
        (r"(\d+) lumens", {"400"}),
        (r"(\d+) days", {"3", "60"}),
        (r"in (\d{4})", {"2019"}),
        (r"(\w+ Green)", {"Moss Green"}),
        (r"(\S+) Roe", {"Ingrid", "&"}),
    ],
)
def test_facts_agree(pattern: str, allowed: set[str]) -> None:
    answers = [row["completion"] for path in (TRAIN, EVAL) for row in read(path).rows]
    found = {value for answer in answers for value in re.findall(pattern, answer)}
    assert found and found <= allowed
