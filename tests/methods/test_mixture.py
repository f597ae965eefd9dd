"""Mixtures: the sum over experts against a loop, the router's algebra, and its losses."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import Intervention, Method, Run
from deltatune.methods.mixture import Experts
from deltatune.models.tiny import inputs, tiny
from deltatune.routers.top_k import Balance, TopK, balance_loss, z_loss


def randomise(adapter: dt.Adapter, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)


def linear(method: Method) -> tuple[nn.Linear, dt.Adapter, Experts]:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).double()
    adapter = dt.attach(model, method)
    randomise(adapter)
    return model, adapter, next(u for _, u in adapter.units() if isinstance(u, Experts))


def loop_gates(gate: Tensor, x: Tensor, k: int) -> list[float]:
    """For one token: softmax over all, the k largest, renormalised."""
    z = [sum(float(a) * float(b) for a, b in zip(row, x, strict=True)) for row in gate.tolist()]
    p = [math.exp(v) / sum(math.exp(u) for u in z) for v in z]
    top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    return [p[i] / sum(p[j] for j in top) if i in top else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(
    "expert", [dt.LoRA(r=2), dt.LoRA(r=2, init=dt.PiSSA()), dt.DoRA(inner=dt.LoRA(r=2)), dt.IA3(on_input=None)]
)
def test_equals_a_loop_over_tokens_and_experts(expert: Method, k: int) -> None:
    model, _, unit = linear(dt.Mixture(expert=expert, n=4, top_k=k, targets=nn.Linear))
    x = torch.randn(2, 3, 6, dtype=torch.double)
    y = model(x)
    for b in range(2):
        for t in range(3):
            g = loop_gates(unit.router.gate, x[b, t], k)
            want = torch.zeros(5, dtype=torch.double)
            for weight, e in zip(g, unit.experts, strict=True):
                bias = e.bias(model.bias) if e.moves_bias else model.bias
                want += weight * (e.weight(model.weight) @ x[b, t] + bias)
            torch.testing.assert_close(y[b, t], want, atol=1e-12, rtol=1e-12)


def test_dropout_of_experts_is_kept() -> None:
    """The product of all experts leaves dropout out, so it must not be taken where there is some."""
    model, _, _ = linear(dt.Mixture(expert=dt.LoRA(r=2, dropout=0.5), targets=nn.Linear))
    x = torch.randn(4, 6, dtype=torch.double)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(x)


def test_low_rank_experts_share_one_base_product() -> None:
    model = Counted(4, 4)
    dt.attach(model, dt.Mixture(targets=Counted))
    Counted.calls = 0
    model(torch.randn(2, 4))
    assert Counted.calls == 1


def test_one_expert_is_the_expert() -> None:
    model, adapter, unit = linear(dt.Mixture(expert=dt.LoRA(r=2), n=1, top_k=1, targets=nn.Linear))
    x = torch.randn(3, 6, dtype=torch.double)
    torch.testing.assert_close(model(x), F.linear(x, unit.experts[0].weight(model.weight), model.bias))


def test_identical_experts_make_the_router_irrelevant() -> None:
    model, _, unit = linear(dt.Mixture(expert=dt.LoRA(r=2), n=3, top_k=2, targets=nn.Linear))
    for e in unit.experts[1:]:
        e.load_state_dict(unit.experts[0].state_dict())
    x = torch.randn(3, 6, dtype=torch.double)
    torch.testing.assert_close(model(x), F.linear(x, unit.experts[0].weight(model.weight), model.bias))


def test_molora_parameter_count() -> None:
    """Per linear layer E r (in + out) + in E."""
    method = dt.Mixture(expert=dt.LoRA(r=2), n=4, targets=nn.Linear)
    assert dt.plan(nn.Linear(6, 5), method).trained == 4 * 2 * (6 + 5) + 6 * 4


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), data=st.data(), seed=st.integers(0, 1000))
def test_gates_are_k_positive_numbers_that_sum_to_one(n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, n))
    torch.manual_seed(seed)
    router = TopK(5, n, k)
    nn.init.normal_(router.gate)
    g = router.gates(torch.randn(7, 5))
    assert ((g > 0).sum(-1) == k).all()
    torch.testing.assert_close(g.sum(-1), torch.ones(7))
    if k == n:
        x = torch.randn(7, 5)
        torch.testing.assert_close(router.gates(x), (x @ router.gate.T).softmax(-1))


def test_gates_are_computed_in_fp32_under_autocast_and_in_bf16() -> None:
    torch.manual_seed(0)
    router = TopK(64, 4, 4)
    x = torch.randn(9, 64).bfloat16()
    want = (x.float() @ router.gate.T).softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.gates(x), want)
    half = TopK(64, 4, 4, dtype=torch.bfloat16)
    assert half.gates(x).dtype == torch.float32


def loop_balance(z: Tensor, k: int) -> float:
    tokens, n = z.shape
    taken, mass = [0.0] * n, [0.0] * n
    for row in z.tolist():
        p = [math.exp(v) / sum(math.exp(u) for u in row) for v in row]
        for i in sorted(range(n), key=lambda i: -p[i])[:k]:
            taken[i] += 1 / (tokens * k)
        for i in range(n):
            mass[i] += p[i] / tokens
    return n * sum(f * p for f, p in zip(taken, mass, strict=True))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_and_z_losses_against_loops(k: int) -> None:
    torch.manual_seed(k)
    z = torch.randn(11, 3, dtype=torch.double)
    assert balance_loss(z, k).item() == pytest.approx(loop_balance(z, k), abs=1e-12)
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in z.tolist()) / 11
    assert z_loss(z).item() == pytest.approx(want, abs=1e-12)


def test_balance_is_one_when_even_and_n_when_collapsed() -> None:
    even = 40 * torch.eye(4, dtype=torch.double).repeat(3, 1)
    assert balance_loss(even, 1).item() == pytest.approx(1, abs=1e-9)
    assert balance_loss(torch.zeros(8, 4, dtype=torch.double), 2).item() == pytest.approx(1)
    collapsed = torch.tensor([[40.0, 0, 0, 0]], dtype=torch.double).repeat(8, 1)
    assert balance_loss(collapsed, 1).item() == pytest.approx(4, abs=1e-9)


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    model, adapter, unit = linear(dt.Mixture(expert=dt.LoRA(r=2), n=3, top_k=1, targets=nn.Linear))
    x = torch.rand(4, 6, dtype=torch.double) + 0.1
    with torch.no_grad():
        unit.router.gate.copy_(torch.tensor([1.0, 0.0, -1.0])[:, None].expand(3, 6))
    model(x).sum().backward()
    assert all(e.b.grad is not None and torch.equal(e.b.grad, torch.zeros_like(e.b)) for e in unit.experts[1:])
    assert unit.experts[0].b.grad.abs().sum() > 0


def test_gradients() -> None:
    model, adapter, unit = linear(dt.Mixture(expert=dt.LoRA(r=2), n=3, top_k=2, targets=nn.Linear))
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *adapter.parameters()))


def extra_losses(model: nn.Module, adapter: dt.Adapter, batch: Tensor, micro: int, steps: int = 1) -> list[float]:
    """What the callbacks add to a loss of zero, micro-batch by micro-batch."""
    run = Run(model, adapter, steps)
    events = [c.start(run) for c in adapter.callbacks()]
    losses = []
    for run.step in range(1, steps + 1):
        for part in batch.chunk(micro):
            run.share = len(part) / len(batch)
            loss = 0 * model(part).sum()
            for e in events:
                loss = e.on_loss(run, loss)
            losses.append(loss.item())
            loss.backward()
        for e in events:
            e.on_step_end(run)
    return losses


def test_the_method_adds_its_balance_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).double().train()
    adapter = dt.attach(model, dt.Mixture(balance=0.3, z=0.1, targets=nn.Linear))
    randomise(adapter)
    assert [c for c in adapter.callbacks()] == [Balance(balance=0.3, z=0.1)]
    x = torch.randn(8, 6, dtype=torch.double)
    units = [u for _, u in adapter.units()]
    want = 0.0
    for u, value in zip(units, (x, model[0](x)), strict=True):
        z = value @ u.router.gate.T
        want += (0.3 * loop_balance(z, 2) + 0.1 * z.logsumexp(-1).square().mean().item()) / 2
    losses = extra_losses(model, adapter, x, micro=1)
    assert losses == [pytest.approx(want, abs=1e-12)]
    assert all(u.router.gate.grad.abs().sum() > 0 for u in units)
    assert all(u.router.logits is None for u in units)


def test_balance_has_the_same_weight_in_many_micro_batches() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).double().train()
    adapter = dt.attach(model, dt.Mixture(balance=1.0, targets=nn.Linear))
    x = torch.randn(2, 6, dtype=torch.double).repeat(4, 1)
    (whole,) = extra_losses(model, adapter, x, micro=1)
    losses = extra_losses(model, adapter, x, micro=4)
    assert sum(losses) == pytest.approx(whole, abs=1e-12)


def test_evaluation_leaves_nothing_behind_and_copies_work_after_training() -> None:
    model, adapter, unit = linear(dt.Mixture(targets=nn.Linear))
    x = torch.randn(3, 6, dtype=torch.double)
    model.eval()
    model(x)
    assert unit.router.logits is None
    model.train()
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)


@pytest.mark.parametrize("expert", [dt.LoRA(r=2), dt.DoRA(inner=dt.LoRA(r=2))])
def test_compiles_without_graph_breaks(expert: Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    adapter = dt.attach(model, dt.Mixture(expert=expert, n=3, targets=nn.Linear))
    randomise(adapter)
    model.train()
    x = torch.randn(4, 6)
    want = model(x)
    grads = torch.autograd.grad(want.sum(), list(adapter.parameters()))
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, want)
    assert all(u.router.logits is not None for _, u in adapter.units())
    for a, b in zip(torch.autograd.grad(y.sum(), list(adapter.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_recomputed_activations_give_the_same_gradients_with_the_balance_loss() -> None:
    torch.manual_seed(0)
    model = tiny("llama").train()
    batch = inputs(model)
    adapter = dt.attach(model, dt.Mixture(expert=dt.LoRA(r=2), balance=0.5))
    randomise(adapter, 0.1)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        run = Run(model, adapter, 1)
        (events,) = (c.start(run) for c in adapter.callbacks())
        events.on_loss(run, model(**batch, labels=batch["input_ids"]).loss).backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
        for p in adapter.parameters():
            p.grad = None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    at = ("call",)

    def build(self, site: dt.core.Site, shared: nn.Module | None) -> Intervention:
        return Shifting(site.shape.out, site.like)


class Shifting(Intervention):
    def __init__(self, out: int, like: dict) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(out, **like))

    def forward(self, call, x):
        return call(x) + self.v


def test_any_intervention_can_be_the_expert() -> None:
    model, _, unit = linear(dt.Mixture(expert=Shift(targets=None), n=3, top_k=3, targets=nn.Linear))
    x = torch.randn(4, 6, dtype=torch.double)
    g = (x @ unit.router.gate.T).softmax(-1)
    want = F.linear(x, model.weight, model.bias) + sum(g[:, i, None] * e.v for i, e in enumerate(unit.experts))
    torch.testing.assert_close(model(x), want)


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(dt.DeltatuneError, match="top_k must lie between 1 and n=2, got 3"):
        dt.Mixture(n=2, top_k=3)
    for expert in (dt.Houlsby(), dt.ParallelAdapter(), dt.PrefixTuning()):
        with pytest.raises(dt.DeltatuneError, match=f"{type(expert).__name__} cannot be an expert"):
            dt.Mixture(expert=expert)
    with pytest.raises(dt.DeltatuneError, match="is an embedding"):
        dt.attach(tiny("llama"), dt.Mixture(targets=dt.Part("embedding")))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_starts_at_the_base_and_comes_back_from_a_file(family: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = tiny(family).requires_grad_(False)
    batch = inputs(model)
    want = model(**batch).logits
    adapter = dt.attach(model, dt.Mixture(expert=dt.LoRA(r=2), n=3))
    assert torch.equal(model(**batch).logits, want)
    randomise(adapter, 0.1)
    moved = model(**batch).logits
    adapter.save(tmp_path)
    dt.detach(model)
    dt.load(model, tmp_path)
    assert torch.equal(model(**batch).logits, moved)
