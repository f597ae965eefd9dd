"""Child-Tuning (arXiv:2109.05687): D's child network, and F's masks, whose mean is the gradient."""

from __future__ import annotations

import pytest
import torch
from selective import begin, changed, data, go, gradients, marked, network, same, top
from torch import nn

import deltatune as dt
from deltatune.core import Events, Run


def test_d_trains_the_top_of_fisher_and_nothing_else_under_weight_decay() -> None:
    model, adapter, run, events = begin(dt.ChildTuning(targets=nn.Linear), 9, weight_decay=0.5)
    found = gradients(network(), data())
    n = sum(p.numel() for p in network().parameters())
    assert same(marked(adapter), top({k: sum(g[k] ** 2 for g in found) for k in found[0]}, int(0.3 * n)))
    go(run, events, 9)
    assert same(changed(model), marked(adapter))


def masked(options: dt.ChildTuningF, step: int, adapter: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients before and after the event of one step."""
    model = network()
    if adapter:
        dt.attach(model, dt.Tune(targets=nn.Linear))
    model(data()[0][0]).sum().backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in trained]
    run = Run(model, dt.adapters(model)["default"] if adapter else None, 3, step=step)
    options.start(run).on_grads(run)
    return before, [p.grad for p in trained]


@pytest.mark.parametrize("adapter", [False, True])
def test_f_keeps_a_share_and_divides_by_it(adapter: bool) -> None:
    before, after = masked(dt.ChildTuningF(p=0.3), 1, adapter)
    for g, m in zip(before, after, strict=True):
        kept = m != 0
        torch.testing.assert_close(m[kept], g[kept] / 0.3)
    share = sum(int((m != 0).sum()) for m in after) / sum(int((g != 0).sum()) for g in before)
    assert 0.1 < share < 0.5


def test_the_expected_masked_gradient_is_the_gradient() -> None:
    """Each entry is g Bernoulli(p) / p: deviation |g| sqrt((1 - p) / p); n masks, five deviations of their mean."""
    n, p = 3000, 0.25
    g = torch.linspace(-2, 3, 40).double()
    w, total, squares = nn.Parameter(torch.zeros(40).double()), torch.zeros(40).double(), torch.zeros(40).double()
    model = nn.Module()
    model.w = w
    run = Run(model, None, n)
    events = dt.ChildTuningF(p=p, seed=1).start(run)
    for run.step in range(1, n + 1):
        w.grad = g.clone()
        events.on_grads(run)
        total += w.grad / n
        squares += w.grad**2 / n
    assert ((total - g).abs() <= 5 * g.abs() * ((1 - p) / p / n) ** 0.5 + 1e-12).all()
    torch.testing.assert_close(squares.sum(), (g**2 / p).sum(), rtol=0.05, atol=0)


def test_masks_depend_on_seed_and_step_alone() -> None:
    def pattern(seed: int, step: int) -> list[bool]:
        return (torch.cat([m.flatten() for m in masked(dt.ChildTuningF(seed=seed), step)[1]]) != 0).tolist()

    assert pattern(0, 1) == pattern(0, 1) and len({tuple(pattern(s, t)) for s in (0, 1) for t in (1, 2)}) == 4


def test_p_of_one_is_the_plain_optimizer() -> None:
    ends = []
    for events in (dt.ChildTuningF(p=1.0).start(Run(network(), None, 5)), Events()):
        model = network()
        adapter = dt.attach(model, dt.Tune(targets=nn.Linear))
        go(Run(model, adapter, 5, optimizer=torch.optim.AdamW(adapter.parameters())), events, 5)
        ends.append(adapter.state_dict())
    assert same(*ends)
    with pytest.raises(dt.DeltatuneError, match="p must lie in"):
        dt.ChildTuningF(p=0)
