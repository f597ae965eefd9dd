"""ReLoRA: the jagged cosine, the cycles, the pruned moments, what is saved, and composition."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from stages import batch, begin, change, deltas, go, trained
from torch import nn

import deltatune as dt
from deltatune.core import Run
from deltatune.models.tiny import inputs, tiny

QUICK = dt.ReLoRA(every=5, warmup=3, restart=2)


def test_the_jagged_cosine_is_the_paper_s() -> None:
    c, w, v, floor, total = 20, 7, 4, 0.1, 100
    rule = dt.ReLoRA(every=c, warmup=w, restart=v, floor=floor)

    def g(u: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (u - w) / (total - w)))

    rates = [rule.rate(t, total) for t in range(1, total + 1)]
    for t in range(1, total + 1):
        n, k = t // c, t % c
        want = t / w if t < w else (k / v) * g(n * c + v) if k < v and c <= t < total else g(t)
        assert rates[t - 1] == pytest.approx(want, abs=1e-15)
    assert [t for t in range(1, total + 1) if rates[t - 1] == 0] == [20, 40, 60, 80]
    assert rates[w - 1] == 1 and rates[-1] == pytest.approx(floor)
    for n in range(1, 5):  # the ramp meets the cosine
        assert rates[n * c + v - 1] == pytest.approx(g(n * c + v)) and rates[n * c] == pytest.approx(g(n * c + v) / v)


def test_the_optimizer_runs_at_these_rates() -> None:
    _, run, events = begin(QUICK, 20)
    found = []
    go(run, events, 20, lambda step: found.append(run.optimizer.param_groups[0]["lr"]))
    assert found == [1e-2 * QUICK.rate(t, 20) for t in range(1, 21)] and found[4] == 0


def test_a_cycle_ends_without_a_change_of_the_function_and_begins_at_b_zero() -> None:
    net, run, events = begin(QUICK, 20)
    x, seen = batch(99)[0], {}
    go(run, events, 10, lambda step: seen.update({step: (net(x).detach().clone(), [trained(d) for d in deltas(run)])}))
    torch.testing.assert_close(net(x), seen[10][0], rtol=1e-12, atol=1e-12)
    for i, d in enumerate(deltas(run)):
        assert not d.b.any() and d.a.abs().max() <= 1 / math.sqrt(d.a.shape[1])
        assert d.a.var().item() == pytest.approx(1 / (3 * d.a.shape[1]), rel=0.5)
        kept = seen[5][1][i] + seen[10][1][i]
        torch.testing.assert_close(change(d), kept, rtol=1e-12, atol=1e-14)
        assert seen[10][1][i].abs().max() > 1e-4 and d.constant.up.shape == (len(d.b), 6)


def test_the_last_cycle_stays_in_the_factors() -> None:
    _, run, events = begin(QUICK, 10)
    go(run, events, 10)
    assert all(d.constant.up.shape[1] == 3 and d.b.any() for d in deltas(run))


def test_the_rank_of_the_change_grows_cycle_by_cycle() -> None:
    _, run, events = begin(QUICK, 25)
    ranks = []
    for end in (5, 10, 15, 20):
        go(run, events, end)
        ranks.append([int(torch.linalg.matrix_rank(change(d))) for d in deltas(run)])
    assert ranks == [[3, 3], [6, 6], [9, 9], [12, 12]]


def test_beyond_full_rank_the_constant_is_dense_and_no_larger() -> None:
    net, run, events = begin(dt.ReLoRA(every=2, warmup=1, restart=1), 40)
    x, seen = batch(99)[0], {}
    go(run, events, 38, lambda step: seen.update(out=net(x).detach()))
    torch.testing.assert_close(net(x), seen["out"], rtol=1e-12, atol=1e-12)
    first, second = deltas(run)  # (12, 14) and (13, 12)
    assert first.constant.up.shape == (12, 12) and first.constant.down.shape == (12, 14)
    assert second.constant.up.shape == (13, 12) and second.constant.down.shape == (12, 12)


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_a_share_of_the_moments_of_the_factors_is_zeroed_and_no_other(by: str) -> None:
    method = dt.Union(methods=(dt.LoRA(r=3, targets="0"), dt.Tune(targets="2")))
    _, run, events = begin(dt.ReLoRA(every=5, warmup=3, restart=2, prune=0.9, prune_by=by), 20, method)
    before: dict[int, dict[str, torch.Tensor]] = {}

    def copy(step: int) -> None:
        before.update({id(p): {k: v.clone() for k, v in s.items()} for p, s in run.optimizer.state.items()})

    go(run, events, 5, copy)
    (d,) = deltas(run)
    for p, state in run.optimizer.state.items():
        for name, now in state.items():
            was = before[id(p)][name]
            if name == "step" or all(p is not q for q in (d.a, d.b)):
                assert torch.equal(now, was)
                continue
            left = int(now.count_nonzero())
            assert torch.equal(now[now != 0], was[now != 0])
            if by == "magnitude":  # strictly above the quantile of the sizes
                assert left == now.numel() - math.ceil(0.9 * now.numel())
                assert now[now != 0].abs().min() > was[now == 0].abs().max()
            else:
                assert 0 < left < 0.35 * now.numel()


def test_draws_depend_on_the_seed_and_the_step_alone() -> None:
    found = []
    for seed in (0, 0, 1):
        _, run, events = begin(dt.ReLoRA(every=5, warmup=3, restart=2, seed=seed), 20)
        torch.manual_seed(seed + len(found))
        go(run, events, 5)
        found.append(deltas(run)[0].a.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


METHODS = {
    "lora": dt.LoRA(r=3, dropout=0.2),
    "lora on embedding": dt.LoRA(r=3, targets=dt.Part("embedding")),
    "pissa": dt.LoRA(r=3, init=dt.PiSSA()),
    "dora": dt.DoRA(inner=dt.LoRA(r=3)),
    "mixture": dt.Mixture(expert=dt.LoRA(r=2), n=3, top_k=2, targets=dt.Part("o")),
    "lora + head": dt.Union(methods=(dt.LoRA(r=3), dt.Tune())),
    "lora + houlsby": dt.Union(methods=(dt.LoRA(r=3), dt.Houlsby(size=2))),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_is_saved_merged_and_taken_back(name: str, family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, other = tiny(family), tiny(family)
    other.load_state_dict(net.state_dict())
    base = {k: v.clone() for k, v in net.state_dict().items()}
    given = inputs(net)
    adapter = dt.attach(net, METHODS[name])
    events = dt.ReLoRA(every=2, warmup=1, restart=1).start(run := Run(net, adapter, 9))
    for step in range(1, 7):
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.02 * torch.randn_like(p))
        before = net(**given).logits
        run.step = step
        events.on_step_end(run)
        torch.testing.assert_close(net(**given).logits, before, rtol=1e-4, atol=2e-5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn_like(p))
    want = net(**given).logits
    assert (want - other(**given).logits).abs().max() > 1e-2
    adapter.save(tmp_path / "a")
    loaded = dt.load(other, tmp_path / "a")
    torch.testing.assert_close(other(**given).logits, want, rtol=1e-4, atol=1e-5)
    twin = dt.attach(other, METHODS[name], "twin")
    twin.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(other(**given).logits, want, rtol=1e-4, atol=1e-5)
    assert loaded.name == "default"
    if name not in ("mixture", "lora + houlsby"):
        dt.merge(net)
        torch.testing.assert_close(net(**given).logits, want, rtol=1e-4, atol=5e-5)
        dt.unmerge(net)
        assert torch.equal(net(**given).logits, want)
    dt.detach(net)
    assert all(torch.equal(v, base[k]) for k, v in net.state_dict().items())


def test_peft_reads_it_as_a_lora_of_the_whole_rank(tmp_path: Path) -> None:
    net, other = tiny("llama"), tiny("llama")
    other.load_state_dict(net.state_dict())
    adapter = dt.attach(net, dt.LoRA(r=2, targets=("q_proj", "down_proj")))
    for share in (1.0, 0.5):
        for d in (u for _, u in adapter.units()):
            with torch.no_grad():
                d.a.normal_(), d.b.normal_(std=0.1)
            d.unload(share)
    adapter.save(tmp_path)
    reader = peft.PeftModel.from_pretrained(other, tmp_path)
    assert reader.peft_config["default"].r == 6
    torch.testing.assert_close(reader(**inputs(net)).logits, net(**inputs(net)).logits, rtol=1e-4, atol=1e-5)


def test_state_of_the_wrong_size_leaves_the_adapter_as_it_was() -> None:
    net, run, events = begin(QUICK, 20)
    go(run, events, 6)
    adapter, out = run.adapter, net(batch(1)[0])
    whole = {k: v.clone() for k, v in adapter.state_dict().items()}
    del whole["0.0.a"]
    whole = {k: v for k, v in whole.items() if "constant" not in k}
    with pytest.raises(dt.DeltatuneError, match="'0.0.a' is missing"):
        adapter.load_state_dict(whole)
    assert torch.equal(net(batch(1)[0]), out)
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    state["0.0.constant.up"] = state["0.0.constant.up"][:, :2]
    with pytest.raises(dt.DeltatuneError, match="do not fit"):
        adapter.load_state_dict(state)


def test_wrong_use_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    adapter = dt.attach(net, dt.Tune(targets="0"))
    with pytest.raises(dt.DeltatuneError, match="ReLoRA: nothing in training"):
        QUICK.start(Run(net, adapter, 20))
    dt.detach(net)
    adapter = dt.attach(net, dt.LoRA(r=1, targets="0"))
    with pytest.raises(dt.DeltatuneError, match="no stage of this run of 5 steps"):
        QUICK.start(Run(net, adapter, 5))
    for wrong in ({"every": 10}, {"every": 100, "warmup": 0}, {"floor": 2}, {"prune": 0}, {"prune_by": "size"}):
        with pytest.raises(dt.DeltatuneError, match="ReLoRA: "):
            dt.ReLoRA(**wrong)
