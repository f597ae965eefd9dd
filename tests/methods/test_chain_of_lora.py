"""Chain of LoRA: the links against LoRAs trained one after the other on bases that are really written."""

from __future__ import annotations

import copy

import pytest
import torch
from stages import batch, begin, change, deltas, go, loss, trained
from torch import nn

import deltatune as dt


def test_a_chain_is_loras_on_merged_bases() -> None:
    """Knots tied by `merge` into a float64 base, a fresh LoRA and a fresh optimizer for every link."""
    net, run, events = begin(dt.ChainOfLoRA(links=3), 12)
    reference = copy.deepcopy(net)
    dt.detach(reference)
    for link in range(3):
        adapter = dt.attach(reference, dt.LoRA(r=3, alpha=6, targets=nn.Linear))
        for (_, unit), d in zip(adapter.units(), deltas(run), strict=True):
            with torch.no_grad():
                unit.a.copy_(d.a)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(4 * link + 1, 4 * link + 5):
            optimizer.zero_grad()
            loss(reference, step).backward()
            optimizer.step()
        dt.merge(reference, keep=False)
        go(run, events, 4 * link + 4)
    torch.testing.assert_close(net(batch(99)[0]), reference(batch(99)[0]), rtol=1e-9, atol=1e-10)


def test_a_knot_changes_nothing_and_forgets_the_moments() -> None:
    net, run, events = begin(dt.ChainOfLoRA(links=2), 10)
    x, seen = batch(99)[0], {}

    def look(step: int) -> None:
        seen[step] = net(x).detach().clone(), [trained(d) for d in deltas(run)]

    go(run, events, 5, look)
    torch.testing.assert_close(net(x), seen[5][0], rtol=1e-12, atol=1e-13)
    assert not run.optimizer.state
    go(run, events, 10, look)
    assert all(int(s["step"]) == 5 for s in run.optimizer.state.values())
    for i, d in enumerate(deltas(run)):  # W_T - W_0 = s sum_j B_j A_j
        torch.testing.assert_close(change(d), seen[5][1][i] + seen[10][1][i], rtol=1e-12, atol=1e-14)
        assert torch.linalg.matrix_rank(change(d)) == 6


def test_links_share_the_run_evenly() -> None:
    assert dt.ChainOfLoRA(links=3).knots(10) == [3, 7, 10] and dt.ChainOfLoRA(links=4).knots(4) == [1, 2, 3, 4]


def test_later_links_may_be_narrower() -> None:
    _, run, events = begin(dt.ChainOfLoRA(links=3, ranks=(3, 1, 2)), 12)
    ranks: list[list[int]] = []

    def look(step: int) -> None:
        if step % 4 == 0:
            ranks.append([int(torch.linalg.matrix_rank(trained(d))) for d in deltas(run)])

    go(run, events, 12, look)
    assert ranks == [[3, 3], [1, 1], [2, 2]]
    assert all(torch.linalg.matrix_rank(change(d)) == 6 for d in deltas(run))
    _, run, events = begin(dt.ChainOfLoRA(links=2, ranks=(2, 2)), 12)
    go(run, events, 5)
    assert all(torch.linalg.matrix_rank(trained(d)) == 2 for d in deltas(run))


def test_the_rate_may_fall_in_every_link() -> None:
    _, run, events = begin(dt.ChainOfLoRA(links=2, schedule="link"), 8)
    found: list[float] = []
    go(run, events, 8, lambda step: found.append(run.optimizer.param_groups[0]["lr"] / 1e-2))
    assert found == pytest.approx([1, 0.75, 0.5, 0.25] * 2)
    _, run, events = begin(dt.ChainOfLoRA(links=2), 8)
    run.optimizer.param_groups[0]["lr"] = 0.123
    go(run, events, 8)
    assert run.optimizer.param_groups[0]["lr"] == 0.123


def test_wrong_use_is_refused() -> None:
    for wrong in ({"links": 1}, {"links": 2, "ranks": (8,)}, {"links": 2, "ranks": (8, 0)}, {"schedule": "cosine"}):
        with pytest.raises(dt.DeltatuneError, match="ChainOfLoRA: "):
            dt.ChainOfLoRA(**wrong)
    with pytest.raises(dt.DeltatuneError, match="the adapter has rank 3"):
        begin(dt.ChainOfLoRA(links=2, ranks=(4, 2)), 8)
    with pytest.raises(dt.DeltatuneError, match="3 steps cannot be shared by 4 links"):
        begin(dt.ChainOfLoRA(links=4), 3)
