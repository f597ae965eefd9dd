"""FISH Mask (arXiv:2111.09839): Fisher information example by example, the global choice, and what stays put."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_of import run_on_llama
from selective import begin, changed, data, go, gradients, marked, network, resumed, same, snapshot, top
from torch import nn

import deltatune as dt

ALL = {"targets": nn.Linear, "density": 0.3}


def fisher(n: int = 12) -> dict[str, torch.Tensor]:
    found = gradients(network(), data()[:n])
    return {k: sum(g[k] ** 2 for g in found) / n for k in found[0]}


def test_the_mask_is_the_top_of_fisher_over_all_parameters() -> None:
    """The number of places of a tensor is free; a batch's squared gradient would choose others."""
    _, adapter, run, events = begin(dt.FishMask(**ALL), 9)
    whole = sum(s.numel() for s in fisher().values())
    assert (
        sum(p.numel() for p in adapter.parameters())
        == int(0.3 * whole)
        == dt.plan(network(), dt.FishMask(**ALL)).trained
    )
    assert same(marked(adapter), top(fisher(), int(0.3 * whole)))
    mean = {k: (sum(g[k] for g in gradients(network(), data())) / 12) ** 2 for k in fisher()}
    assert not same(marked(adapter), top(mean, int(0.3 * whole)))


def test_samples_bound_the_examples() -> None:
    _, adapter, _, _ = begin(dt.FishMask(**ALL, samples=4), 9)
    assert same(marked(adapter), top(fisher(4), 30)) and not same(top(fisher(4), 30), top(fisher(), 30))


def test_scoring_leaves_no_trace() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = network()
    torch.set_rng_state(state)
    model, adapter, run, _ = begin(dt.FishMask(**ALL), 9, model)
    assert torch.equal(torch.rand(3), want) and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters()) and all(u.watch is None for _, u in adapter.units())


def test_outside_the_mask_nothing_changes_under_weight_decay() -> None:
    model, adapter, run, events = begin(dt.FishMask(**ALL), 9, lr=0.1, weight_decay=0.5)
    go(run, events, 9)
    assert same(changed(model), marked(adapter))


def test_everything_is_full_fine_tuning() -> None:
    ends = []
    for method in (dt.FishMask(targets=nn.Linear, density=1.0), dt.Tune(targets=nn.Linear)):
        model = network()
        if isinstance(method, dt.FishMask):
            model, adapter, run, events = begin(method, 6, model, weight_decay=0)
        else:
            adapter, events = dt.attach(model, method), dt.core.Events()
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0)
            run = dt.core.Run(model, adapter, 6, optimizer=optimizer)
        go(run, events, 6)
        dt.merge(model)
        ends.append([p.detach() for n, p in model.named_parameters() if "adapters" not in n])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_site_without_a_place_trains_nothing_and_others_do() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e-3)  # little of the gradient reaches the first layer
    _, adapter, run, events = begin(dt.FishMask(targets=nn.Linear, density=0.05), 9, model)
    empty = [u for _, u in adapter.units() if not u.values.numel()]
    assert empty and not any(u.values.requires_grad for u in empty)
    go(run, events, 3)
    assert same(changed(model), marked(adapter))


@pytest.mark.parametrize("stop", [1, 4])
def test_resumes_bit_for_bit_without_scoring_again(stop: int) -> None:
    method = dt.FishMask(**ALL)
    _, whole, run, events = begin(method, 9)
    go(run, events, stop)
    kept = snapshot(whole, run, events)
    go(run, events, 9)
    _, rest, run, events = resumed(method, 9, kept, stop)
    go(run, events, 9)
    assert same(whole.state_dict(), rest.state_dict())


def test_a_loaded_adapter_keeps_its_mask(tmp_path: Path) -> None:
    _, adapter, run, events = begin(dt.FishMask(**ALL), 9)
    go(run, events, 3)
    adapter.save(tmp_path)
    model = network()
    loaded = dt.load(model, tmp_path)
    run = dt.core.Run(model, loaded, 5)
    (events,) = (c.start(run) for c in loaded.callbacks())
    events.on_train_start(run)
    assert same(loaded.state_dict(), adapter.state_dict())


def test_wrong_use_is_refused() -> None:
    model = network()
    adapter = dt.attach(model, dt.FishMask(**ALL))
    (choice,) = adapter.callbacks()
    run = dt.core.Run(model, adapter, 3)
    with pytest.raises(dt.DeltatuneError, match="Run.examples"):
        choice.start(run).on_train_start(run)
    dt.activate(model)
    with pytest.raises(dt.DeltatuneError, match="activate it"):
        run.examples = lambda: iter([lambda: model(data()[0][0]).sum()])
        choice.start(run).on_train_start(run)
    with pytest.raises(dt.DeltatuneError, match="no unit of it"):
        next(iter(dt.FishMask(density=0.4).callbacks())).start(run)
    with pytest.raises(dt.DeltatuneError, match="density=0.001 leaves no place"):
        dt.attach(network(), dt.FishMask(targets=nn.Linear, density=0.001), "small")
    with pytest.raises(dt.DeltatuneError, match="samples must be at least 1, got 0"):
        dt.FishMask(samples=0)


def test_two_of_a_union_choose_apart() -> None:
    first, last = dt.FishMask(targets="0", density=0.25), dt.FishMask(targets="3", density=0.5)
    model = network()
    adapter = dt.attach(model, dt.core.Union(methods=(first, last)))
    run = dt.core.Run(model, adapter, 3, examples=begin(dt.FishMask(**ALL), 3)[2].examples)
    assert [len(c.start(run).units) for c in adapter.callbacks()] == [2, 2]


def test_a_whole_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Through `fit`, on packed text, stopped in the middle and taken up again."""
    run_on_llama(dt.FishMask(density=0.05, samples=6), tmp_path, stop=4)
