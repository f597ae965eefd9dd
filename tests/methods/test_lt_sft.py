"""LT-SFT (arXiv:2110.07560): the two phases, the rewinding, and differences that add."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_of import run_on_llama
from selective import begin, changed, go, marked, network, resumed, same, snapshot, top
from torch import nn

import deltatune as dt
from deltatune.core import Events, Run

TENTH = {"targets": nn.Linear, "density": 0.1}


def test_phase_one_is_full_fine_tuning_and_its_largest_changes_are_the_mask() -> None:
    model, adapter, run, events = begin(dt.LTSFT(**TENTH, full=0.4, full_lr=1e-2), 10, weight_decay=0)
    full = network()
    tuned = dt.attach(full, dt.Tune(targets=nn.Linear))
    other = Run(full, tuned, 4, optimizer=torch.optim.AdamW(tuned.parameters(), lr=1e-2, weight_decay=0))
    go(other, Events(), 4)
    dt.merge(full)
    start = dict(network().named_parameters())
    moved = {n: (full.get_parameter(n) - p).abs().detach() for n, p in start.items()}
    n = sum(p.numel() for p in start.values())
    assert sum(p.numel() for p in adapter.parameters()) == n
    go(run, events, 4)
    assert same(marked(adapter), top(moved, int(0.1 * n)))
    assert all(not p.any() for p in adapter.parameters()) and not run.optimizer.state  # rewound, a new optimizer
    go(run, events, 10)
    assert same(changed(model), marked(adapter)) and sum(int(m.sum()) for m in changed(model).values()) == int(0.1 * n)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_outside_the_mask_every_coordinate_stays_bit_for_bit(weight_decay: float) -> None:
    model, adapter, run, events = begin(dt.LTSFT(**TENTH), 10, weight_decay=weight_decay)
    went: list[dict[str, torch.Tensor]] = []
    go(run, events, 5)
    go(run, events, 10, lambda step: went.append(changed(model)))
    assert len(went) == 5 and all(same(places, marked(adapter)) for places in went)
    assert sum(int(places.sum()) for places in went[-1].values()) == 10
    assert all(torch.equal(model.get_parameter(n), p) for n, p in network().named_parameters())


def test_phase_two_with_every_place_is_full_fine_tuning_from_the_base() -> None:
    model, adapter, run, events = begin(dt.LTSFT(targets=nn.Linear, density=1.0, full=0.5), 8, weight_decay=0)
    go(run, events, 4)
    run.step = 0  # the same data again
    events.turn = -1  # type: ignore[attr-defined]
    go(run, events, 4)
    full = network()
    tuned = dt.attach(full, dt.Tune(targets=nn.Linear))
    go(Run(full, tuned, 4, optimizer=torch.optim.AdamW(tuned.parameters(), lr=1e-2, weight_decay=0)), Events(), 4)
    for net in (model, full):
        dt.merge(net)
    for n in ("0.weight", "0.bias", "3.weight", "3.bias"):
        torch.testing.assert_close(model.get_parameter(n), full.get_parameter(n), rtol=1e-9, atol=1e-11)


def test_a_language_and_a_task_add() -> None:
    """Stacking is theta_0 + phi_L + phi_T, in either order; where both have a place, both count."""
    model = network().eval()
    given = dict(model.named_parameters())
    base = {n: p.detach().clone() for n, p in given.items()}
    for i, name in enumerate(("language", "task")):
        adapter = dt.attach(model, dt.LTSFT(targets=nn.Linear, density=0.4), name)
        for _, u in adapter.units():
            g = torch.Generator().manual_seed(i)
            u.move_to(torch.randperm(u.size, generator=g)[: max(1, u.size // 2)].sort().values)
            u.values.data.normal_(generator=g)
    total = {n: p.clone() for n, p in base.items()}
    overlap = 0
    for name in ("language", "task"):
        for path, _, u, at in dt.adapters(model)[name].sites():
            flat = total[f"{path}.{at}"].view(-1)
            overlap += sum(flat[i] != base[f"{path}.{at}"].view(-1)[i] for i in u.indices.long())
            for i, v in zip(u.indices.tolist(), u.values.detach(), strict=True):
                flat[i] += v
    assert overlap
    x = torch.randn(3, 6).double()
    want = torch.func.functional_call(network().eval(), total, (x,))
    for order in (("language", "task"), ("task", "language")):
        dt.activate(model, *order)
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
        dt.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
        dt.unmerge(model)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())


def test_the_task_trains_on_top_of_the_language() -> None:
    """Phase 1 starts from theta_0 + phi_L, whose own values stay."""
    model = network()
    language = dt.attach(model, dt.Sparse(targets=nn.Linear, density=0.5), "language")
    for p in language.parameters():
        p.data.normal_()
    before = {k: v.clone() for k, v in language.state_dict().items()}
    task = dt.attach(model, dt.LTSFT(**TENTH), "task")
    dt.activate(model, "language", "task")
    run = Run(model, task, 6, optimizer=torch.optim.AdamW(task.parameters(), lr=1e-2))
    (events,) = (c.start(run) for c in task.callbacks())
    events.on_train_start(run)
    go(run, events, 6)
    assert same(before, language.state_dict()) and sum(int(p.count_nonzero()) for p in task.parameters()) == 10


def test_the_head_is_rewound_with_the_rest() -> None:
    model = network()
    both = dt.core.Union(methods=(dt.LTSFT(targets="0", density=0.2), dt.Tune(targets="3")))
    _, adapter, run, events = begin(both, 6, model)
    head = {n: p.detach().clone() for n, p in adapter.named_parameters() if n.startswith("3.")}
    went = []
    go(
        run,
        events,
        3,
        lambda step: went.append(not torch.equal(dict(adapter.named_parameters())["3.0.v"], head["3.0.v"])),
    )
    assert head and all(went) and all(torch.equal(p, head[n]) for n, p in adapter.named_parameters() if n in head)


def test_the_penalty_is_the_mean_change() -> None:
    model, adapter, run, events = begin(dt.LTSFT(**TENTH, l1=0.5), 10)
    for p in adapter.parameters():
        p.data.normal_()
    run.share = 0.25
    change = torch.cat([p.detach().flatten() for p in adapter.parameters()]).abs().mean()
    torch.testing.assert_close(events.on_loss(run, torch.tensor(2.0).double()), 2 + 0.5 * 0.25 * change)


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resumes_bit_for_bit_in_either_phase(stop: int) -> None:
    method = dt.LTSFT(**TENTH)
    _, whole, run, events = begin(method, 10)
    go(run, events, stop)
    kept = snapshot(whole, run, events)
    go(run, events, 10)
    _, rest, run, events = resumed(method, 10, kept, stop)
    go(run, events, 10)
    assert same(whole.state_dict(), rest.state_dict())


def test_an_adapter_with_its_places_goes_on_with_them() -> None:
    _, adapter, run, events = begin(dt.LTSFT(**TENTH), 10)
    go(run, events, 10)
    places = marked(adapter)
    run = Run(run.model, adapter, 4, optimizer=torch.optim.AdamW(adapter.parameters()))
    (events,) = (c.start(run) for c in adapter.callbacks())
    events.on_train_start(run)
    go(run, events, 4)
    assert same(marked(adapter), places) and run.keep_from == 0


def test_what_leaves_no_second_phase_is_refused() -> None:
    with pytest.raises(dt.DeltatuneError, match="first phase of 1.0 of 4 steps leaves no step"):
        begin(dt.LTSFT(**TENTH, full=1.0), 4)


def test_a_whole_run_keeps_the_best_of_phase_two(tmp_path: Path) -> None:
    """Through `fit`, interrupted in phase 1; full fine-tuning has the lower loss, and is not what is kept."""
    adapter, result = run_on_llama(dt.LTSFT(density=0.02), tmp_path, stop=3)
    size = sum(u.size for _, u in adapter.units())
    assert result.best is not None and result.best["step"] > 4
    assert sum(p.numel() for p in adapter.parameters()) == int(0.02 * size)


@pytest.mark.parametrize("stop", [1, 6])
def test_the_schedule_runs_in_each_phase(stop: int, tmp_path: Path) -> None:
    """Linear over 8 steps, 4 a phase: 4/4, 3/4, 2/4, 1/4 of each one's rate, also in a run that was broken off."""
    _, result = run_on_llama(
        dt.LTSFT(density=0.02, full_lr=1e-3), tmp_path, stop=stop, lr=4e-3, schedule="linear", warmup=0
    )
    assert [round(r["lr"] * 1e3, 9) for r in result.history] == [1, 0.75, 0.5, 0.25, 4, 3, 2, 1][stop:]
