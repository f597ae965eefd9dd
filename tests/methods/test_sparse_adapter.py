"""SparseAdapter: five scores, exact counts, and weights that are pruned for good."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import selective
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.callbacks.sparse_adapter import Score
from deltatune.core import Callback, Events, Run
from deltatune.models.tiny import inputs, tiny

SCORES = Score.__args__


def batches(model: nn.Module, n: int) -> Iterator[Tensor]:
    pairs = selective.data()
    for i in range(min(n, 3)):
        x, y = (torch.cat(t) for t in zip(*pairs[4 * i : 4 * i + 4], strict=True))
        yield selective.loss(model, x, y)


def begin(method: dt.core.Method, model: nn.Module | None = None, losses: Any = batches
          ) -> tuple[nn.Module, dt.Adapter, Run, list[Events]]:  # fmt: skip
    """As `fit` begins, with a network of two sites."""
    model = selective.network() if model is None else model
    torch.manual_seed(5)
    adapter = dt.attach(model, method)
    run = Run(model, adapter, 10, losses=None if losses is None else lambda n: losses(model, n))
    events = [c.start(run) for c in adapter.callbacks()]
    run.optimizer = torch.optim.AdamW([p for p in adapter.parameters()], lr=1e-2, weight_decay=0.1)
    return model, adapter, run, events


def start(run: Run, events: list[Events]) -> None:
    for e in events:
        e.on_train_start(run)


def on(method: str = "houlsby", **options: Any) -> dt.SparseAdapter:
    inner = {
        "houlsby": dt.Houlsby(size=4, targets="0|3", norms=None),
        "lora": dt.LoRA(r=4, targets="0|3"),
    }[method]
    return dt.SparseAdapter(inner=inner, **{"std": 0.5} | options)


def projections(adapter: dt.Adapter) -> dict[str, Tensor]:
    return {n: p for n, p in adapter.named_parameters() if n.rsplit(".", 1)[1] in ("down", "up", "a", "b")}


def masks(adapter: dt.Adapter) -> dict[str, Tensor]:
    return {n.removesuffix("_mask"): t.clone() for n, t in adapter.state_dict().items() if n.endswith("_mask")}


def gradients(model: nn.Module, adapter: dt.Adapter) -> dict[str, Tensor]:
    model.eval()
    total = sum(batches(model, 3))
    model.train()
    weights = projections(adapter)
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


def plainly(model: nn.Module, adapter: dt.Adapter, x: Tensor) -> Tensor:
    """The network in operations that can be differentiated twice, without dropout."""
    p = dict(adapter.named_parameters())
    for i in ("0", "3"):
        u = F.linear(x, model[int(i)].weight, model[int(i)].bias)
        if f"{i}.0.a" in p:
            x = u + 16 / 4 * x @ p[f"{i}.0.a"].T @ p[f"{i}.0.b"].T
        else:
            h = F.gelu(F.linear(u, p[f"{i}.0.down"], p[f"{i}.0.down_bias"]), approximate="tanh")
            x = u + F.linear(h, p[f"{i}.0.up"], p[f"{i}.0.up_bias"])
        x = x.tanh() if i == "0" else x
    return x


def expected(score: str, model: nn.Module, adapter: dt.Adapter) -> dict[str, Tensor]:
    """The paper's scores, by autograd alone."""
    w = projections(adapter)
    if score == "magnitude":
        return {n: t.abs() for n, t in w.items()}
    if score == "snip":  # |dL/dM| at M = 1, and L's derivative by M is g * w
        g = gradients(model, adapter)
        return {n: (g[n] * t).abs() for n, t in w.items()}
    if score == "grasp":  # with the exact Hessian
        leaves, total = list(w.values()), sum(batches(lambda x: plainly(model, adapter, x), 3))
        g = torch.autograd.grad(total, leaves, create_graph=True)
        flow = sum((d.detach() * d).sum() for d in g)
        return {n: t * h for (n, t), h in zip(w.items(), torch.autograd.grad(flow, leaves), strict=True)}
    z = {}
    for down in [n for n in w if n.endswith(("down", ".a"))]:
        up = down[:-4] + "up" if down.endswith("down") else down[:-1] + "b"
        leaves = [w[n].detach().abs().requires_grad_() for n in (up, down)]
        (torch.ones(len(leaves[0])).double() @ leaves[0] @ leaves[1]).sum().backward()
        z |= {n: leaf * leaf.grad for n, leaf in zip((up, down), leaves, strict=True)}
    return z


@pytest.mark.parametrize("inner", ["houlsby", "lora"])
@pytest.mark.parametrize("score", [s for s in SCORES if s != "random"])
def test_keeps_the_best_of_all_weights(score: str, inner: str) -> None:
    model, adapter, run, events = begin(on(inner, score=score, density=0.3))
    want = {n: z.detach() for n, z in expected(score, model, adapter).items()}
    before = {n: p.detach().clone() for n, p in projections(adapter).items()}
    start(run, events)
    found, best = masks(adapter), selective.top(want, int(0.3 * sum(z.numel() for z in want.values())))
    assert selective.same(found, best)
    assert all(torch.equal(p, before[n] * found[n]) for n, p in projections(adapter).items())
    assert len({float(m.float().mean()) for m in found.values()}) > 1  # one threshold for all, not one for each


def test_random_masks_are_those_of_their_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        _, adapter, run, events = begin(on(score="random", seed=seed, density=0.4), losses=None)
        start(run, events)
        drawn.append(masks(adapter))
    assert selective.same(drawn[0], drawn[1]) and not selective.same(drawn[0], drawn[2])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("density", [0.05, 0.37, 1.0])
def test_the_count_is_exact(score: str, density: float) -> None:
    """N - ceil((1 - density) N), ties included: here half of all weights are equal."""
    _, adapter, run, events = begin(on(score=score, density=density))
    with torch.no_grad():
        for p in projections(adapter).values():
            p.view(-1)[: p.numel() // 2] = 0.1
    start(run, events)
    kept, n = (
        sum(int(t.sum()) for t in ts) for ts in (masks(adapter).values(), map(torch.ones_like, masks(adapter).values()))
    )
    assert kept == int(density * n)


def test_ties_with_a_larger_adapter_at_the_size_of_the_small_one() -> None:
    """Large-Sparse: twice the bottleneck at half the density is as many weights."""
    small = sum(p.numel() for p in projections(begin(on(density=1.0))[1]).values())
    large = dt.SparseAdapter(inner=dt.Houlsby(size=8, targets="0|3", norms=None), density=0.5)
    _, adapter, run, events = begin(large)
    start(run, events)
    assert sum(int(m.sum()) for m in masks(adapter).values()) == small


def steps(run: Run, n: int = 6) -> None:
    assert run.optimizer is not None
    run.model.eval()
    for i in range(n):
        x, y = selective.data()[i]
        selective.loss(run.model, x, y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


@pytest.mark.parametrize("inner", ["houlsby", "lora"])
def test_pruned_weights_stay_zero_and_masks_as_they_are(inner: str) -> None:
    model, adapter, run, events = begin(on(inner, density=0.4))
    start(run, events)
    before = masks(adapter)
    kept = {n: p.detach().clone() for n, p in projections(adapter).items()}
    with torch.no_grad():  # whatever lies under the mask is not seen
        for n, p in projections(adapter).items():
            assert not p[~before[n]].any()
    steps(run)
    assert selective.same(before, masks(adapter))
    for n, p in projections(adapter).items():
        assert not p[~before[n]].any() and (p != kept[n])[before[n]].any()
        unit = dict(adapter.units())[n.rsplit(".", 1)[0]]
        assert torch.equal(getattr(unit, n.rsplit(".", 1)[1]), p * before[n])
    x = selective.data()[0][0]
    want = model(x)
    with torch.no_grad():
        for n, p in projections(adapter).items():
            p[~before[n]] = 7.0
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("inner", ["houlsby", "lora"])
def test_of_density_one_it_trains_as_the_dense_adapter(inner: str) -> None:
    def trained(sparse: bool) -> dict[str, Tensor]:
        method = on(inner, density=1.0)
        _, adapter, run, events = begin(method if sparse else method.inner)
        if not sparse:
            torch.manual_seed(6)
        with torch.no_grad():
            g = torch.Generator().manual_seed(3)
            for p in projections(adapter).values():
                p.copy_(torch.randn(p.shape, generator=g).double())
        start(run, events)
        steps(run)
        return {n: p.detach() for n, p in adapter.named_parameters()}

    assert selective.same(trained(True), trained(False))


def test_projections_start_as_the_authors_draw_them() -> None:
    model = tiny("bert")
    adapter = dt.attach(model, dt.SparseAdapter(inner=dt.Houlsby(size=64)))
    assert all(0.018 < p.std() < 0.022 for p in projections(adapter).values())
    assert {n.rsplit(".", 1)[1] for n, _ in adapter.named_parameters() if ".intermediate" not in n} >= {
        "v"
    }  # norms train
    own = dt.attach(model, dt.SparseAdapter(inner=dt.Houlsby(size=64, init=dt.NearIdentity(std=0.1))), "own")
    assert all(p.std() > 0.08 for p in projections(own).values())


@pytest.mark.parametrize("score", ["snip", "synflow", "magnitude"])
def test_zero_projections_are_refused(score: str) -> None:
    """With W_up = 0 the score of every weight of both matrices is zero."""
    model, adapter, run, events = begin(on(score=score, std=None))
    assert not any(z.any() for z in expected("snip", model, adapter).values())
    with pytest.raises(dt.DeltatuneError, match="where a projection is zero there is nothing to compare; give std"):
        start(run, events)


def test_a_site_that_loses_a_factor_rests() -> None:
    model, adapter, run, events = begin(on("lora", score="magnitude", density=0.1))
    with torch.no_grad():
        for n, p in projections(adapter).items():
            if n.startswith("0.0.b"):
                p.mul_(1e-6)
    start(run, events)
    rests = {n: not p.requires_grad for n, p in projections(adapter).items()}
    assert rests == {n: n.startswith("0.") for n in rests}
    steps(run, 1)


def test_a_loaded_adapter_keeps_its_masks(tmp_path: Any) -> None:
    model, adapter, run, events = begin(on(density=0.4))
    start(run, events)
    steps(run)
    x = selective.data()[0][0]
    want, found = model(x), masks(adapter)
    adapter.save(tmp_path)
    other = selective.network().eval()
    loaded = dt.load(other, tmp_path)
    assert torch.equal(other(x), want) and loaded.method == adapter.method
    again = Run(other, loaded, 5)
    for c in loaded.callbacks():
        c.start(again).on_train_start(again)
    assert selective.same(masks(loaded), found)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(twin(x), want)
        assert type(next(u for _, u in dt.adapters(twin)["default"].units())).__name__ == "SparseBottleneck"


def test_a_pruned_lora_merges() -> None:
    model, adapter, run, events = begin(on("lora", density=0.4))
    start(run, events)
    model.eval()
    x = selective.data()[0][0]
    want = model(x)
    dt.merge(model)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    "inner", [dt.Pfeiffer(size=4), dt.ParallelAdapter(size=4), dt.LoRA(r=2), dt.DoRA(inner=dt.LoRA(r=2))]
)
def test_any_bottleneck_can_be_pruned(inner: dt.core.Method) -> None:
    model = tiny("llama")
    given = inputs(model)
    loss = lambda net, n: iter([net(**given, labels=given["input_ids"]).loss])
    _, adapter, run, events = begin(dt.SparseAdapter(inner=inner, density=0.5), model, loss)
    start(run, events)
    found = masks(adapter)
    n = sum(m.numel() for m in found.values())
    assert found and sum(int(m.sum()) for m in found.values()) == n // 2
    assert all(p.grad is None for p in adapter.parameters())
    model(**given, labels=given["input_ids"]).loss.backward()
    for name, mask in found.items():
        grad = dict(adapter.named_parameters())[name].grad
        assert not grad[~mask].any() and grad[mask].any()


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(dt.DeltatuneError, match="IA3 has no down and up projections"):
        dt.attach(tiny("llama"), dt.SparseAdapter(inner=dt.IA3()))
    with pytest.raises(dt.DeltatuneError, match="an init from data comes when"):
        dt.attach(tiny("llama"), dt.SparseAdapter(inner=dt.LoRA(init=dt.EVA())))
    with pytest.raises(dt.DeltatuneError, match="give them to inner"):
        dt.SparseAdapter(targets="q_proj")
    with pytest.raises(dt.DeltatuneError, match="score='snap' is not one of random, magnitude, snip"):
        dt.SparseAdapter(score="snap")  # type: ignore[arg-type]
    with pytest.raises(dt.DeltatuneError, match=r"density must lie in \(0, 1\], got 0"):
        dt.SparseAdapter(density=0)
    _, _, run, events = begin(on(score="grasp"), losses=None)
    with pytest.raises(dt.DeltatuneError, match="score='grasp' needs training data"):
        start(run, events)


def test_the_callback_is_that_of_the_method() -> None:
    (callback,) = dt.SparseAdapter().callbacks()
    assert isinstance(callback, Callback)
    model = tiny("llama")
    run = Run(model, dt.attach(model, dt.LoRA()), 3)
    with pytest.raises(dt.DeltatuneError, match="SparseAdapter: the adapter in training has no unit of it"):
        callback.start(run)


def test_forward_is_the_adapter_of_masked_weights() -> None:
    """u + (M_up * W_up) gelu((M_down * W_down) u + b_down) + b_up."""
    model, adapter, run, events = begin(on(density=0.5))
    start(run, events)
    steps(run, 3)
    unit = next(u for name, u in adapter.units() if name.startswith("0"))
    x = selective.data()[0][0]
    u = F.linear(x, model[0].weight, model[0].bias)
    p, m = dict(unit.named_parameters()), dict(unit.named_buffers())
    h = F.gelu(u @ (p["down"] * m["down_mask"]).T + p["down_bias"], approximate="tanh")
    torch.testing.assert_close(model[0](x), u + h @ (p["up"] * m["up_mask"]).T + p["up_bias"])
