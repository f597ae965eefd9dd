from __future__ import annotations

import json

import pytest

from deltatune import registry
from deltatune.cli import methods
from deltatune.methods.houlsby import Houlsby
from deltatune.methods.lora import LoRA


def test_one_method_is_explained(run) -> None:
    result = run("methods", "lo_ra")
    assert result.exit_code == 0, result.output
    for text in ("arXiv:2106.09685", "W' = W + s B A", "scaling", "alpha/r", "can be merged", "learning rate of 0.001"):
        assert text in result.output


def test_an_unknown_name_gets_the_nearest(run) -> None:
    result = run("methods", "lorra")
    assert result.exit_code == 1 and "did you mean 'LoRA'" in result.stderr


@pytest.mark.parametrize(("cls", "mergeable"), [(LoRA, True), (Houlsby, False)])
def test_what_a_method_trains(cls, mergeable) -> None:
    found = methods.measure(cls)
    assert found["mergeable"] is mergeable and found["trained"] > 0
    # 30 blocks of LoRA r = 8 on q, k, v, o, gate, up, down
    if cls is LoRA:
        block = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
        assert found["trained"] == 30 * 8 * block


def test_all_of_them(run) -> None:
    classes = {n: c for p in registry.PACKAGES for n, c in registry.public(p).items()}
    result = run("methods", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.output)}
    assert rows.keys() == classes.keys()
    assert rows["PiSSA"]["kind"] == "init" and rows["PiSSA"].keys().isdisjoint({"trained", "lr"})
    assert {o["name"]: o for o in rows["LoRA"]["options"]}["r"] == {
        "name": "r",
        "type": "int",
        "default": "8",
        "required": False,
    }
    assert all(row["summary"] for row in rows.values())
    unmeasured = {n: row["why"] for n, row in rows.items() if row["kind"] == "method" and row["trained"] is None}
    assert "has a bias" in unmeasured["BitFit"]  # Llama has none
    assert all(unmeasured.values())
    assert "BitFit" in run("methods").output
