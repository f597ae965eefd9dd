"""Diff pruning (arXiv:2012.07463): hard concrete gates, the expected norm, the projection, and exact sparsity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from runs_of import run_on_llama
from selective import begin, changed, data, go, marked, network, resumed, same, snapshot
from torch import nn

import deltatune as dt
from deltatune.methods.hard_concrete import exceeds, mean, sampled

ALPHAS = [-3.0, -0.4, 0.0, 1.0, 2.5, 5.0]
HALF = {"targets": nn.Linear, "density": 0.1}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gates_against_their_distribution(alpha: float) -> None:
    """200,000 draws; and P(z > 0) = sigmoid(alpha - log(1.5 / 1.5)) = sigmoid(alpha)."""
    torch.manual_seed(0)
    a = torch.tensor(alpha, dtype=torch.float64)
    z = sampled(a.expand(200_000))
    p = 1 / (1 + math.exp(-alpha))
    assert exceeds(a, 0).item() == pytest.approx(p, abs=1e-12)
    assert (z > 0).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 2e5) + 1e-4)
    assert z.mean().item() == pytest.approx(mean(a).item(), abs=5 * z.std().item() / math.sqrt(2e5) + 1e-4)
    # the integral of P(z > t), by a million rectangles
    t = (torch.arange(1_000_000).double() + 0.5) / 1_000_000
    s = (t + 1.5) / 3
    assert mean(a).item() == pytest.approx(torch.sigmoid(a - (s / (1 - s)).log()).mean().item(), abs=1e-6)


def test_the_gradient_of_a_gate() -> None:
    """dz/dalpha = (r - l) s (1 - s) where 0 < s (r - l) + l < 1, else 0."""
    alpha = torch.linspace(-3, 5, 400).double().requires_grad_()
    torch.manual_seed(1)
    sampled(alpha).sum().backward()
    torch.manual_seed(1)
    u = torch.rand_like(alpha.detach())
    s = 1 / (1 + (-(u.log() - (1 - u).log() + alpha.detach())).exp())
    inside = ((3 * s - 1.5) > 0) & ((3 * s - 1.5) < 1)
    torch.testing.assert_close(alpha.grad, torch.where(inside, 3 * s * (1 - s), 0.0))
    assert 0 < int(inside.sum()) < 400


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_is_the_expected_norm(structured: bool) -> None:
    kind = dt.StructuredDiffPruning if structured else dt.DiffPruning
    _, adapter, run, events = begin(kind(**HALF, l0=0.01), 10)
    want = 0.0
    for _, u in adapter.units():
        u.alpha.data.normal_()
        each = (1 / (1 + (-u.alpha.detach()).exp())).sum()
        if structured:
            u.group.data.normal_()
            each = each / (1 + (-u.group.detach()).exp())[0]
        want += each.item()
    run.share = 0.5
    got = events.on_loss(run, torch.tensor(2.0).double())
    assert got.item() == pytest.approx(2 + 0.01 * 0.5 * want, rel=1e-12)
    sizes = {n.rpartition(".")[2]: p.numel() for n, p in adapter.named_parameters() if n.startswith("0.0.")}
    assert sizes == {"values": 48, "alpha": 48} | ({"group": 1} if structured else {})


def test_gates_are_drawn_anew_in_training_and_at_their_mean_elsewhere() -> None:
    model, adapter, run, events = begin(dt.StructuredDiffPruning(**HALF), 10)
    x = data()[0][0]
    with torch.no_grad():
        for _, u in adapter.units():
            u.values.normal_()
            u.alpha.fill_(0.5)
            u.group.fill_(1.0)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    (_, u) = next(adapter.units())
    torch.testing.assert_close(u.difference(), u.values * mean(u.alpha) * mean(u.group))
    events.on_train_end(run)
    assert torch.equal(model.train()(x), model(x))


def test_gates_far_open_are_fine_tuning_and_far_shut_the_base() -> None:
    model = network().eval()
    base = model(data()[0][0]).detach()
    adapter = dt.attach(model, dt.DiffPruning(**HALF))
    for _, u in adapter.units():
        u.values.data.normal_()
        u.alpha.data.fill_(60.0)
    tuned = network().eval()
    with torch.no_grad():
        for path, _, u, at in adapter.sites():
            p = tuned.get_parameter(f"{path}.{at}")
            p += u.values.view(p.shape)
    torch.testing.assert_close(model(data()[0][0]), tuned(data()[0][0]), rtol=1e-8, atol=1e-8)
    for _, u in adapter.units():
        u.alpha.data.fill_(-60.0)
    torch.testing.assert_close(model(data()[0][0]), base, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [dt.DiffPruning, dt.StructuredDiffPruning])
def test_the_projection_keeps_the_largest_and_phase_two_trains_them(kind: type[dt.DiffPruning]) -> None:
    model, adapter, run, events = begin(kind(**HALF, gated_lr=0.02), 10, lr=0.05, weight_decay=0.5)
    rates = lambda: [(g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups]
    assert rates() == [(0.1, 0.0), (0.02, 0.5)]
    before: dict[str, torch.Tensor] = {}

    def keep(step: int) -> None:
        model.eval()
        before.update({f"{p}.{at}": u.difference().detach().clone() for p, _, u, at in adapter.sites()})
        model.train()

    go(run, events, 4, keep)
    assert rates() == [(0.1, 0.0), (0.02, 0.5)]
    go(run, events, 5, keep)
    assert rates() == [(0.1, 0.0), (0.05, 0.5)]
    k = int(0.1 * 101)
    least = torch.cat(list(before.values())).abs().sort(descending=True).values[k - 1]
    for path, _, u, at in adapter.sites():
        d = before[f"{path}.{at}"]
        assert u.indices.tolist() == (d.abs() >= least).nonzero().flatten().tolist()
        torch.testing.assert_close(u.values.detach(), d[u.indices.long()])
    assert [p.numel() for n, p in adapter.named_parameters() if "values" not in n] == [0] * (
        8 if "S" in kind.__name__ else 4
    )
    assert events.on_loss(run, torch.tensor(1.0)) == 1
    go(run, events, 10)
    assert sum(int(m.sum()) for m in marked(adapter).values()) == k and same(changed(model), marked(adapter))


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resumes_bit_for_bit_in_either_phase(stop: int) -> None:
    method = dt.StructuredDiffPruning(**HALF, alpha_lr=0.02)
    torch.manual_seed(3)
    _, whole, run, events = begin(method, 10)
    go(run, events, stop)
    kept, state = snapshot(whole, run, events), torch.get_rng_state()
    go(run, events, 10)
    _, rest, run, events = resumed(method, 10, kept, stop)
    torch.set_rng_state(state)
    go(run, events, 10)
    assert same(whole.state_dict(), rest.state_dict())


def test_a_whole_run_ends_sparse(tmp_path: Path) -> None:
    adapter, result = run_on_llama(dt.DiffPruning(density=0.02), tmp_path, stop=3)
    n = sum(u.size for _, u in adapter.units())
    assert sum(p.numel() for p in adapter.parameters()) == int(0.02 * n)
    assert result.best is not None and result.best["step"] > 4
