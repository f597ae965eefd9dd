from __future__ import annotations

import json

import pytest

import deltatune as dt
from deltatune import registry
from deltatune.cli import methods
from deltatune.models.tiny import tiny
from deltatune.train.batching import packs
from deltatune.train.options import TrainOptions


def test_one_method_is_explained(run) -> None:
    result = run("methods", "lo_ra")
    assert result.exit_code == 0, result.output
    for text in ("arXiv:2106.09685", "W' = W + s B A", "scaling", "alpha/r", "can be merged", "learning rate of 0.001"):
        assert text in result.output


def test_an_unknown_name_gets_the_nearest(run) -> None:
    result = run("methods", "lorra")
    assert result.exit_code == 1 and "did you mean 'LoRA'" in result.stderr


D, KV, MLP, BLOCKS, TOKENS = 576, 192, 1536, 30, 49152  # of the reference
BOTH_SIDES = 2 * 2 * D + 2 * (D + KV) + 3 * (D + MLP)  # in + out, of q and o, of k and v, of gate, up and down
KNOWN = {  # whether it merges, and what it trains
    dt.LoRA: (True, BLOCKS * 8 * BOTH_SIDES),
    dt.DoRA: (True, BLOCKS * (8 * BOTH_SIDES + 2 * D + 2 * KV + 2 * MLP + D)),  # a magnitude for each output
    dt.DyLoRA: (True, BLOCKS * 8 * BOTH_SIDES),
    dt.LongLoRA: (True, BLOCKS * (8 * (4 * D + 2 * (D + KV)) + 2 * D) + D + TOKENS * D),
    dt.IA3: (True, BLOCKS * (2 * KV + MLP)),
    dt.Tune: (True, TOKENS * D),
    dt.OFT: (True, None),
    dt.FishMask: (True, None),
    dt.DiffPruning: (True, None),
    dt.PromptTuning: (False, 20 * D),
    dt.PrefixTuning: (False, BLOCKS * 16 * 2 * KV),
    dt.Houlsby: (False, None),
    dt.Pfeiffer: (False, None),
    dt.ParallelAdapter: (False, None),
    dt.Compacter: (False, None),
    dt.LadderSideTuning: (False, None),
    dt.Mixture: (False, None),
    dt.MAM: (False, None),
}


@pytest.mark.parametrize("cls", KNOWN)
def test_what_is_known_of_a_method(cls) -> None:
    found, (merges, trained) = methods.measure(cls), KNOWN[cls]
    assert found["mergeable"] is merges and found["trained"] == (trained or found["trained"]) > 0


def test_a_method_that_is_broken_is_no_method_that_does_not_merge() -> None:
    class Broken(dt.LoRA):
        def build(self, site, shared):  # type: ignore[no-untyped-def]
            raise TypeError("build() got an unexpected argument")

    with pytest.raises(TypeError, match="unexpected argument"):
        methods.describe(Broken)
    assert methods.measure(dt.LoRA)["mergeable"]  # nothing was left on the reference


@pytest.mark.parametrize("cls", [dt.LoRA, dt.IA3, dt.Houlsby, dt.PrefixTuning])
def test_documents_share_rows_under_methods_that_treat_each_token_alike(cls) -> None:
    net = tiny("llama")
    dt.attach(net, cls())
    assert packs(net, True, None, TrainOptions(), 64) != "none"


@pytest.mark.parametrize("cls", [dt.PromptTuning, dt.PTuning, dt.MultitaskPrompt, dt.IntrinsicPrompt, dt.LongLoRA])
def test_documents_have_rows_of_their_own_under_prompts_and_segments_of_rows(cls) -> None:
    net = tiny("llama")
    dt.attach(net, cls())
    assert packs(net, True, None, TrainOptions(), 64) == "none"


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
    assert unmeasured.keys() == {"AdapterFusion", "BitFit", "S4"}
    assert "has a bias" in unmeasured["BitFit"] and "no bias" in unmeasured["S4"]  # Llama has none
    assert "adapters are those to fuse" in unmeasured["AdapterFusion"]
    assert [n for n, row in rows.items() if n in unmeasured and row["mergeable"] is not None] == []
    assert "BitFit" in run("methods").output
