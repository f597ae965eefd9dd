"""SAM, the second-order approximation method (arXiv:2211.15583): whose gradients, per tensor, and the quadratic."""

from __future__ import annotations

import itertools

import pytest
import torch
from selective import begin, changed, data, go, gradients, marked, network, resumed, same, snapshot, top
from torch import nn

import deltatune as dt
from deltatune.core import Run

HALF = {"targets": nn.Linear, "density": 0.25}


def test_each_tensor_trains_its_largest_summed_gradients() -> None:
    model, adapter, run, events = begin(dt.SAM(**HALF), 9, lr=0.1, weight_decay=0.5)
    found = gradients(network(), data())
    whole = {k: sum(g[k] for g in found).abs() for k in found[0]}
    want = {k: top({k: s}, int(0.25 * s.numel()))[k] for k, s in whole.items()}
    assert same(marked(adapter), want) and {k: int(m.sum()) for k, m in want.items()} == {
        "0.weight": 12, "0.bias": 2, "3.weight": 10, "3.bias": 1}  # fmt: skip
    go(run, events, 9)
    assert same(changed(model), want)


def test_gradients_that_cancel_are_not_chosen_as_fisher_would() -> None:
    """w_0 gets +3 and -3, w_1 gets +1 and +1: the loss on both examples moves with w_1 alone."""
    chosen = {}
    for method in (dt.SAM(targets=nn.Linear, density=0.5), dt.FishMask(targets=nn.Linear, density=0.5)):
        model = nn.Linear(2, 1, bias=False).double()
        adapter = dt.attach(model, method)
        losses = [lambda s=s, m=model: m(torch.tensor([[3.0 * s, 1.0]]).double()).sum() for s in (1, -1)]
        run = Run(model, adapter, 3, examples=lambda losses=losses: iter(losses))
        (events,) = (c.start(run) for c in adapter.callbacks())
        events.on_train_start(run)
        chosen[type(method).__name__] = next(adapter.units())[1].indices.tolist()
    assert chosen == {"SAM": [1], "FishMask": [0]}


def test_on_a_quadratic_of_one_curvature_the_choice_is_the_best_of_all() -> None:
    """L(w) = h/2 |w - c|^2: of all masks with two ones the chosen one reaches the lowest minimum."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    c = torch.randn(1, 6).double()
    adapter = dt.attach(model, dt.SAM(targets=nn.Linear, density=2 / 6))

    def quadratic() -> torch.Tensor:
        return 1.5 * (model(torch.eye(6).double()).T - c).square().sum()

    run = Run(model, adapter, 3, examples=lambda: iter([quadratic]))
    (events,) = (e.start(run) for e in adapter.callbacks())
    events.on_train_start(run)
    far = (model.weight.detach() - c).square().flatten()
    left = {pair: float(far.sum() - far[list(pair)].sum()) for pair in itertools.combinations(range(6), 2)}
    assert tuple(next(adapter.units())[1].indices.tolist()) == min(left, key=left.__getitem__)


def test_small_tensors_get_no_place_and_rest() -> None:
    model, adapter, run, events = begin(dt.SAM(targets=nn.Linear, density=0.1), 9)
    sizes = {f"{path}.{at}": (u.values.numel(), u.values.requires_grad) for path, _, u, at in adapter.sites()}
    assert sizes == {"0.weight": (4, True), "0.bias": (0, False), "3.weight": (4, True), "3.bias": (0, False)}
    go(run, events, 2)
    with pytest.raises(dt.DeltatuneError, match="density=0.01 leaves no place"):
        dt.attach(network(), dt.SAM(targets=nn.Linear, density=0.01))
    with pytest.raises(dt.DeltatuneError, match="samples must be at least 1"):
        dt.SAM(samples=0)


def test_resumes_bit_for_bit() -> None:
    _, whole, run, events = begin(dt.SAM(**HALF), 9)
    go(run, events, 4)
    kept = snapshot(whole, run, events)
    go(run, events, 9)
    _, rest, run, events = resumed(dt.SAM(**HALF), 9, kept, 4)
    go(run, events, 9)
    assert same(whole.state_dict(), rest.state_dict())
