"""PeriodicLoRA: momentum unloading keeps the function, plain unloading begins anew, m near 0 is LoRA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import batch, begin, change, deltas, go, trained

import deltatune as dt


@settings(max_examples=20, deadline=None)
@given(st.floats(0.001, 1))
def test_unloading_any_share_keeps_the_function(m: float) -> None:
    """m B A + (sqrt(1 - m) B) (sqrt(1 - m) A) = B A; scaling both factors by 1 - m would leave m + (1 - m)^2 of it."""
    net, run, events = begin(dt.PeriodicLoRA(every=4, m=m), 20)
    x, seen = batch(99)[0], {}

    def look(step: int) -> None:
        seen[step] = net(x).detach().clone(), [trained(d) for d in deltas(run)]

    go(run, events, 4, look)
    torch.testing.assert_close(net(x), seen[4][0], rtol=1e-12, atol=1e-13)
    for d, was in zip(deltas(run), seen[4][1], strict=True):
        assert was.abs().max() > 1e-4
        torch.testing.assert_close(d.constant.up @ d.constant.down, m * was, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(trained(d), (1 - m) * was, rtol=1e-12, atol=1e-14)


def test_stages_by_hand() -> None:
    """The base written and the factors shrunk, as in the paper, by a loop; the same change after three stages."""
    m = 0.3
    _, run, events = begin(dt.PeriodicLoRA(every=4, m=m), 20)
    written = [torch.zeros_like(change(d)) for d in deltas(run)]

    def write(step: int) -> None:
        if step % 4 == 0:
            for total, d in zip(written, deltas(run), strict=True):
                total += m * trained(d)

    go(run, events, 15, write)
    for total, d in zip(written, deltas(run), strict=True):
        torch.testing.assert_close(change(d), total + trained(d), rtol=1e-12, atol=1e-14)
        assert d.constant.up.shape[1] == 9 and torch.linalg.matrix_rank(change(d)) > 3


def test_the_moments_of_all_factors_are_pruned_at_random() -> None:
    _, run, events = begin(dt.PeriodicLoRA(every=4, m=0.5), 20)
    before: dict[int, int] = {}
    go(run, events, 4, lambda step: before.update({id(p): int(s["step"]) for p, s in run.optimizer.state.items()}))
    left = [s[k].count_nonzero() for s in run.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert len(left) == 8 and sum(left) <= 3  # of some 300
    assert all(int(s["step"]) == before[id(p)] == 4 for p, s in run.optimizer.state.items())


def test_plain_unloading_begins_anew_and_trains_on() -> None:
    _, run, events = begin(dt.PeriodicLoRA(every=4, m=1), 20)
    go(run, events, 4)
    assert not run.optimizer.state and all(d.a.any() and not d.b.any() for d in deltas(run))
    kept = [d.constant.up.clone() for d in deltas(run)]
    go(run, events, 7)
    assert all(d.b.any() and torch.equal(d.constant.up, k) for d, k in zip(deltas(run), kept, strict=True))
    assert all(int(s["step"]) == 3 for s in run.optimizer.state.values())


def test_a_vanishing_share_is_lora() -> None:
    """Up to the pruned moments: for the steps of the first stage to the bit, at its end to the share."""
    _, run, events = begin(dt.PeriodicLoRA(every=4, m=1e-9), 20)
    _, plain, idle = begin(dt.PeriodicLoRA(every=19), 20)
    go(run, events, 4)
    go(plain, idle, 4)
    for d, e in zip(deltas(run), deltas(plain), strict=True):
        torch.testing.assert_close(trained(d), trained(e), rtol=1e-8, atol=0)


def test_wrong_use_is_refused() -> None:
    for wrong in ({"every": 0}, {"m": 0}, {"m": 1.5}):
        with pytest.raises(dt.DeltatuneError, match="PeriodicLoRA: every="):
            dt.PeriodicLoRA(**wrong)
    with pytest.raises(dt.DeltatuneError, match="PeriodicLoRA: no stage"):
        begin(dt.PeriodicLoRA(every=20), 20)
    with pytest.raises(dt.DeltatuneError, match="PeriodicLoRA: nothing in training"):
        begin(dt.PeriodicLoRA(every=2), 20, dt.Tune(targets="0"))
