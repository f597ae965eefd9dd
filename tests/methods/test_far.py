"""FAR (arXiv:2205.01541): learners by their L1 change, frozen nodes bit for bit, whole layers put together again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_of import run_on_llama
from selective import begin, changed, go, network, resumed, same, snapshot
from torch import nn

import deltatune as dt
from deltatune.core import Events, Run
from deltatune.models.tiny import tiny

QUARTER = {"targets": nn.Linear, "retention": 0.25, "priming": 0.3}


def plain(model: nn.Module) -> nn.Module:
    whole = network()
    dt.merge(model)
    whole.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    dt.unmerge(model)
    return whole


def tuned(steps: int) -> nn.Module:
    full = network()
    adapter = dt.attach(full, dt.Tune(targets=nn.Linear))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0)
    go(Run(full, adapter, steps, optimizer=optimizer), Events(), steps)
    return plain(full)


@pytest.mark.parametrize("start", ["base", "primed"])
def test_learners_are_the_rows_that_priming_moved_most(start: str) -> None:
    model, adapter, run, events = begin(dt.FAR(**QUARTER, start=start), 10, weight_decay=0)
    go(run, events, 3)
    primed, base = tuned(3), network()
    for path, _, u, _ in adapter.sites():
        now, was = primed.get_submodule(path), base.get_submodule(path)
        moved = (now.weight - was.weight).abs().sum(1)
        r = round(0.25 * len(moved))
        want = sorted(range(len(moved)), key=lambda j: -moved[j])[:r]
        assert u.indices.tolist() == sorted(want) and u.values.shape == (r, was.in_features) and u.shift.shape == (r,)
        got = plain(model).get_submodule(path)
        for name in ("weight", "bias"):
            source = getattr(now if start == "primed" else was, name)
            torch.testing.assert_close(getattr(got, name)[u.indices], source[u.indices], rtol=1e-9, atol=1e-11)


def test_frozen_nodes_stay_bit_for_bit_under_weight_decay() -> None:
    model, adapter, run, events = begin(dt.FAR(**QUARTER), 10, lr=0.1, weight_decay=0.5)
    go(run, events, 10)
    moved = changed(model)
    for path, module, u, _ in adapter.sites():
        learns = torch.zeros(module.out_features, dtype=torch.bool).index_fill(0, u.indices, True)
        assert torch.equal(moved[f"{path}.weight"].any(1), learns) and torch.equal(moved[f"{path}.bias"], learns)


def test_all_nodes_is_full_fine_tuning_of_these_layers() -> None:
    model, _, run, events = begin(
        dt.FAR(targets=nn.Linear, retention=1.0, priming=0.5, start="primed"), 8, weight_decay=0
    )
    go(run, events, 4)
    for one, other in zip(plain(model).parameters(), tuned(4).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_the_count_and_the_layers() -> None:
    """round(rho out)(in + 1) for each feed-forward layer with biases, and no other layer."""
    model = tiny("bert")
    plan = dt.plan(model, dt.FAR(retention=0.25))
    assert {s.path.split(".", 4)[4] for s in plan.sites} == {"intermediate.dense", "output.dense"}
    assert plan.trained == 2 * (16 * (32 + 1) + 8 * (64 + 1))
    assert dt.plan(tiny("llama"), dt.FAR(retention=0.25)).trained == 2 * (2 * 16 * 32 + 8 * 64)


def test_outputs_of_frozen_nodes_are_the_base_s() -> None:
    model = nn.Linear(6, 8).double()
    x = torch.randn(3, 6).double()
    want = model(x)
    adapter = dt.attach(model, dt.FAR(**QUARTER))
    (_, u) = next(adapter.units())
    for p in adapter.parameters():
        p.data.normal_()
    learns = torch.zeros(8, dtype=torch.bool).index_fill(0, u.indices, True)
    assert torch.equal(model(x)[:, ~learns], want[:, ~learns]) and not (model(x) == want)[:, learns].any()


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_resumes_bit_for_bit(stop: int) -> None:
    method = dt.FAR(**QUARTER)
    _, whole, run, events = begin(method, 10)
    go(run, events, stop)
    kept = snapshot(whole, run, events)
    go(run, events, 10)
    _, rest, run, events = resumed(method, 10, kept, stop)
    go(run, events, 10)
    assert same(whole.state_dict(), rest.state_dict())


def test_wrong_use_is_refused_and_a_whole_run_resumes(tmp_path: Path) -> None:
    with pytest.raises(dt.DeltatuneError, match="start is 'base' or 'primed', got 'rewind'"):
        dt.FAR(start="rewind")  # type: ignore[arg-type]
    with pytest.raises(dt.DeltatuneError, match="retention=0.01 of the 8 nodes of 0 is none"):
        dt.attach(network(), dt.FAR(targets=nn.Linear, retention=0.01))
    model = network()
    adapter = dt.attach(model, dt.FAR(**QUARTER))
    state = dict(adapter.state_dict())
    with pytest.raises(dt.DeltatuneError, match="each learner needs a row of 6"):
        adapter.load_state_dict(state | {"0.0.values": torch.zeros(3, 6)})
    run_on_llama(dt.FAR(priming=0.25), tmp_path, stop=3)
