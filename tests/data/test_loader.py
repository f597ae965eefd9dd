from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.core.errors import DeltatuneError
from deltatune.data import Batch, Batches, Example, split


def _examples(lengths: list[int]) -> list[Example]:
    return [Example([i + 1] * n, [-100] + [i + 1] * (n - 1), f"f:{i}") for i, n in enumerate(lengths)]


def _same(a: Batch, b: Batch) -> bool:
    tensors = [k for k, v in a.inputs.items() if isinstance(v, torch.Tensor)]
    return (
        all(torch.equal(a.inputs[k], b.inputs[k]) for k in tensors)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.segments, b.segments)
        and (a.origins, a.tokens, a.trained_tokens) == (b.origins, b.tokens, b.trained_tokens)
    )


MODES: list[dict[str, Any]] = [
    {"packing": True, "tokens_per_batch": 64, "max_length": 32},
    {"packing": True, "batch_size": 2, "max_length": 40},
    {"tokens_per_batch": 64},
    {"batch_size": 3, "side": "left"},
    {"batch_size": 2, "group_by_length": True},
    {"tokens_per_batch": 64, "group_by_length": True},
]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.sampled_from(MODES),
    st.integers(0, 3),
    st.integers(0, 30),
)
def test_a_restored_cursor_continues_bit_for_bit(lengths: list[int], mode: dict[str, Any], seed: int, n: int) -> None:
    batches = Batches(_examples(lengths), seed=seed, **mode)
    list(islice(batches, n))
    state = json.loads(json.dumps(batches.state_dict()))
    expected = list(islice(batches, 12))
    again = Batches(_examples(lengths), seed=seed, **mode)
    again.load_state_dict(state)
    assert all(_same(a, b) for a, b in zip(expected, islice(again, 12), strict=True))
    assert again.state_dict() == batches.state_dict()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.sampled_from(MODES), st.integers(0, 3))
def test_an_epoch_and_one_pass_hold_every_example_once(lengths: list[int], mode: dict[str, Any], epoch: int) -> None:
    batches = Batches(_examples(lengths), **mode)
    drawn: list[Batch] = []
    while batches.epoch <= epoch:
        current = batches.epoch
        batch = next(batches)
        if current == epoch:
            drawn.append(batch)
    for seen in (drawn, list(batches.once())):
        origins = [origin for b in seen for row in b.origins for origin in row]
        assert sorted(origins) == sorted(f"f:{i}" for i in range(len(lengths)))
        for b in seen:
            assert len(b.origins) == b.labels.shape[0] == b.segments.shape[0]
            assert b.tokens == sum(lengths[int(o[2:])] for row in b.origins for o in row)
            assert b.trained_tokens == sum(lengths[int(o[2:])] - 1 for row in b.origins for o in row)
            if "tokens_per_batch" in mode:
                assert b.labels.numel() <= mode["tokens_per_batch"]
            if "batch_size" in mode:
                assert len(b.labels) <= mode["batch_size"]


def test_epochs_and_seeds_differ_and_are_counted() -> None:
    def order(batches: Batches) -> list[str]:
        return [o for b in islice(batches, len(batches)) for row in b.origins for o in row]

    batches = Batches(_examples([5] * 30), batch_size=4)
    first, second = order(batches), order(batches)
    assert batches.epoch == 2 and batches.count(2) == 16
    assert first != second and sorted(first) == sorted(second)
    assert order(Batches(_examples([5] * 30), batch_size=4, seed=1)) != first


def test_evaluating_leaves_the_cursor_where_it_is() -> None:
    batches = Batches(_examples([5] * 30), batch_size=4)
    next(batches)
    state = batches.state_dict()
    assert len(list(batches.once())) == len(list(batches.once())) == 8
    assert batches.state_dict() == state


def test_grouping_by_length_pads_less() -> None:
    examples = _examples([i % 29 + 1 for i in range(300)])

    def padding(grouped: bool) -> int:
        batches = Batches(examples, batch_size=4, group_by_length=grouped)
        return sum(batch.labels.numel() - batch.tokens for batch in batches.once())

    assert padding(True) * 5 < padding(False)


@pytest.mark.parametrize("n", [1, 7, 8, 30])
def test_ranks_make_equally_many_batches_of_different_rows(n: int) -> None:
    ranks = [Batches(_examples([3] * n), batch_size=2, rank=r, world=3) for r in range(3)]
    assert len({len(b) for b in ranks}) == 1 and len(ranks[0]) >= 1
    drawn = [[o for b in islice(r, len(r)) for row in b.origins for o in row] for r in ranks]
    if n >= 6:
        assert len({o for rows in drawn for o in rows}) == sum(map(len, drawn))
    assert all(r.epoch == 1 for r in ranks)
    once = [o for r in ranks for b in r.once() for row in b.origins for o in row]
    assert sorted(once) == sorted(f"f:{i}" for i in range(n))


def test_other_data_or_settings_cannot_be_resumed() -> None:
    state = Batches(_examples([3] * 9), batch_size=2).state_dict()
    assert len(json.dumps(state)) < 200
    for other in (
        Batches(_examples([3] * 8), batch_size=2),
        Batches(_examples([3] * 9)[::-1], batch_size=2),
        Batches(_examples([3] * 9), batch_size=3),
        Batches(_examples([3] * 9), batch_size=2, seed=1),
    ):
        with pytest.raises(DeltatuneError, match="resume: the examples, the seed, or the batch settings"):
            other.load_state_dict(state)


def test_what_cannot_be_batched_says_so() -> None:
    with pytest.raises(DeltatuneError, match="f:1: 9 tokens do not fit into a row of 8; raise tokens_per_batch"):
        Batches(_examples([3, 9]), tokens_per_batch=8, packing=True)
    with pytest.raises(DeltatuneError, match="f:1: 9 tokens do not fit into a batch of 8"):
        Batches(_examples([3, 9]), tokens_per_batch=8)
    with pytest.raises(DeltatuneError, match="exactly one of"):
        Batches(_examples([3]))
    with pytest.raises(DeltatuneError, match="packing: only causal"):
        Batches(_examples([3]), batch_size=1, packing=True, task="classification")
    with pytest.raises(DeltatuneError, match="no examples"):
        Batches([], batch_size=1)


def test_split() -> None:
    rows = list(range(200))
    kept, held = split(rows, "5%")
    assert len(held) == 10 and sorted(kept + held) == rows and held == sorted(held) and kept == sorted(kept)
    assert (kept, held) == split(rows, "5%") and held != split(rows, "5%", seed=1)[1]
    assert len(split(rows, 7)[1]) == len(split(rows, "7")[1]) == 7
    assert len(split(rows[:5], "1%")[1]) == 1
    for wrong in ("150%", "five", 200, 0, "-1"):
        with pytest.raises(DeltatuneError, match="cannot be held out; give a share such as '5%'"):
            split(rows, wrong)
