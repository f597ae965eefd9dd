"""FISH-DIP (arXiv:2311.03748): the hardest examples, the exchange of places, and what stays meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_of import run_on_llama
from selective import begin, changed, data, go, gradients, loss, marked, network, resumed, same, snapshot, top
from torch import nn

import deltatune as dt

SOME = {"targets": nn.Linear, "density": 0.2}


def masks_of_hardest(model: nn.Module, n: int, k: int) -> dict[str, torch.Tensor]:
    """The definition, with a plain model."""
    still = [loss(model.eval(), x, y).item() for x, y in data()]
    hardest = sorted(range(len(still)), key=lambda i: -still[i])[:n]
    found = gradients(model, [data()[i] for i in hardest])
    return top({key: sum(g[key] ** 2 for g in found) for key in found[0]}, k)


def merged(model: nn.Module) -> nn.Module:
    """A plain network with the weights in effect."""
    plain = network()
    dt.merge(model)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    dt.unmerge(model)
    return plain


def test_masks_follow_the_hardest_examples() -> None:
    model, adapter, run, events = begin(dt.FishDip(**SOME, every=4, hardest=3), 12, lr=0.05)
    k = int(0.2 * 101)
    assert same(marked(adapter), masks_of_hardest(network(), 3, k))
    assert not same(marked(adapter), masks_of_hardest(network(), 12, k))
    first = marked(adapter)
    go(run, events, 3)
    assert same(marked(adapter), first)
    go(run, events, 4)
    assert same(marked(adapter), masks_of_hardest(merged(model), 3, k)) and not same(marked(adapter), first)


def test_all_examples_and_no_refresh_is_fish_mask() -> None:
    _, one, _, _ = begin(dt.FishDip(**SOME, every=99, hardest=12), 9)
    _, other, _, _ = begin(dt.FishMask(**SOME), 9)
    assert same(marked(one), marked(other))


def test_between_refreshes_only_the_mask_moves_and_a_refresh_moves_nothing() -> None:
    model, adapter, run, events = begin(dt.FishDip(**SOME, every=3, hardest=2), 12, lr=0.1, weight_decay=0.5)
    kept = 0
    for step in range(1, 12):
        before, mask = dict(merged(model).named_parameters()), marked(adapter)
        after: dict[str, torch.Tensor] = {}
        go(run, events, step, lambda _, after=after: after.update(merged(model).named_parameters()))
        for n, p in before.items():
            assert torch.equal(p[~mask[n]], after[n][~mask[n]]), (n, step)
        assert all(torch.equal(p, after[n]) for n, p in merged(model).named_parameters())
        kept = sum(len(u.kept_indices) for _, u in adapter.units())
        assert sum(p.numel() for p in adapter.parameters()) == 20
        for _, u in adapter.units():
            assert not set(u.indices.tolist()) & set(u.kept_indices.tolist())
    assert kept and sum(int(c.sum()) for c in changed(model).values()) <= 20 + kept


def test_moments_start_anew_with_a_mask() -> None:
    _, adapter, run, events = begin(dt.FishDip(**SOME, every=3, hardest=2), 12)
    go(run, events, 2)
    assert run.optimizer.state
    go(run, events, 3)
    assert not run.optimizer.state


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_resumes_bit_for_bit(stop: int) -> None:
    method = dt.FishDip(**SOME, every=3, hardest=2)
    _, whole, run, events = begin(method, 10)
    go(run, events, stop)
    kept = snapshot(whole, run, events)
    go(run, events, 10)
    _, rest, run, events = resumed(method, 10, kept, stop)
    go(run, events, 10)
    assert same(whole.state_dict(), rest.state_dict())


def test_a_file_carries_what_is_kept(tmp_path: Path) -> None:
    model, adapter, run, events = begin(dt.FishDip(**SOME, every=3, hardest=2), 12)
    go(run, events, 12)
    x = torch.randn(3, 6).double()
    want = model.eval()(x)
    assert any(len(u.kept_indices) for _, u in adapter.units())
    adapter.save(tmp_path)
    dt.detach(model)
    dt.load(model, tmp_path)
    assert torch.equal(model(x), want)


def test_options_are_checked_and_a_whole_run_resumes(tmp_path: Path) -> None:
    with pytest.raises(dt.DeltatuneError, match="every=0"):
        dt.FishDip(every=0)
    run_on_llama(dt.FishDip(density=0.02, every=2, hardest=3), tmp_path, stop=3)
