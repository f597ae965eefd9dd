"""LoRA-FA: what is frozen, the projected gradient, what the backward pass keeps, and PEFT step by step."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import Events, Run
from deltatune.models.tiny import inputs, tiny

IN, OUT, R = 24, 20, 4


def begin(callback: dt.LoRAFA, dtype: torch.dtype = torch.float64, **lora: object) -> tuple[nn.Module, Run, Events]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    adapter = dt.attach(net, dt.LoRA(**{"r": R, "alpha": 6, "targets": "0"} | lora))
    run = Run(net, adapter, 10)
    events = callback.start(run)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-6, weight_decay=0.0)
    events.on_train_start(run)
    return net, run, events


def unit(run: Run):
    ((_, found),) = run.adapter.units()
    return found


def backward(net: nn.Module, step: int = 0) -> Tensor:
    """The full gradient dL/dW' of a loss, whose gradients of A and B are left on the adapter."""
    g = torch.Generator().manual_seed(step)
    dtype = net[0].weight.dtype
    x, y = (torch.randn(32, n, generator=g, dtype=dtype) for n in (IN, OUT))
    out = net(x)
    (out - y).square().sum().backward()
    return (2 * (out - y)).detach().T @ x


def train(net: nn.Module, run: Run, events: Events, steps: int) -> None:
    for step in range(1, steps + 1):
        run.step = step
        backward(net, step)
        events.on_grads(run)
        run.optimizer.step()
        events.on_step_end(run)
        run.optimizer.zero_grad()


def test_a_stays_bit_for_bit_and_the_update_lies_in_its_row_space() -> None:
    net, run, events = begin(dt.LoRAFA())
    a = unit(run).a
    before = a.detach().clone()
    train(net, run, events, 5)
    assert torch.equal(a, before) and a.grad is None and run.optimizer.param_groups[0]["params"] == [unit(run).b]
    update = unit(run).weight(net[0].weight) - net[0].weight
    outside = torch.eye(IN, dtype=a.dtype) - torch.linalg.pinv(a) @ a
    assert update.abs().max() > 1e-3 and (update @ outside).abs().max() < 1e-12
    events.on_train_end(run)
    assert a.requires_grad


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_the_step_is_the_projection_of_the_full_gradient(scaling: str) -> None:
    net, run, events = begin(dt.LoRAFA(), scaling=scaling)
    full, u = backward(net), unit(run)
    s = 6 / (R if scaling == "alpha/r" else math.sqrt(R))
    torch.testing.assert_close(u.b.grad, s * full @ u.a.T)
    events.on_grads(run)
    torch.testing.assert_close(s * u.b.grad @ u.a, full @ torch.linalg.pinv(u.a) @ u.a, rtol=1e-6, atol=1e-6)
    nearest = torch.linalg.lstsq((s * u.a).T, full.T).solution.T
    torch.testing.assert_close(u.b.grad, nearest, rtol=1e-6, atol=1e-6)


def test_with_orthonormal_rows_and_scaling_one_nothing_is_projected() -> None:
    net, run, events = begin(dt.LoRAFA(), alpha=R)
    with torch.no_grad():
        unit(run).a.copy_(torch.linalg.qr(torch.randn(IN, R, dtype=torch.float64))[0].T)
    backward(net)
    plain = unit(run).b.grad.clone()
    events.on_grads(run)
    torch.testing.assert_close(unit(run).b.grad, plain, rtol=1e-7, atol=1e-7)


def test_the_inverse_follows_a_that_something_wrote_to() -> None:
    net, run, events = begin(dt.LoRAFA())
    backward(net)
    events.on_grads(run)
    net.zero_grad()
    with torch.no_grad():
        unit(run).a.mul_(3)
    full = backward(net)
    events.on_grads(run)
    a = unit(run).a
    torch.testing.assert_close(1.5 * unit(run).b.grad @ a, full @ torch.linalg.pinv(a) @ a, rtol=1e-6, atol=1e-6)


def blocks(n: int, method: dt.core.Method) -> tuple[nn.Module, dt.Adapter]:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(IN, IN)) for _ in range(n))).double()
    return net, dt.attach(net, method)


def test_a_product_that_sites_share_is_projected_once() -> None:
    """The least squares of s g A against the sum of the sites' full gradients."""
    net, adapter = blocks(3, dt.LoRADrop(r=R, alpha=6, kept=(), targets=nn.Linear))
    a, b = adapter.parameters()
    events = dt.LoRAFA().start(Run(net, adapter, 1))
    nn.init.normal_(b)
    x = torch.randn(32, IN, dtype=torch.float64)
    net(x).square().mean().backward()
    weights = [unit.weight(m.weight).detach().requires_grad_() for _, m, unit, _ in adapter.sites()]
    for w, (linear,) in zip(weights, net, strict=True):
        x = F.linear(x, w, linear.bias)
    full = sum(torch.autograd.grad(x.square().mean(), weights))
    events.on_grads(Run(net, adapter, 1))
    nearest = torch.linalg.lstsq((6 / R * a).T, full.T).solution.T
    torch.testing.assert_close(b.grad, nearest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", ["a", "s"])
def test_a_shared_b_without_one_projection_is_refused(other: str) -> None:
    net, adapter = blocks(2, dt.LoRA(r=R, targets=nn.Linear))
    (_, first), (_, second) = adapter.units()
    second.b = first.b
    if other == "s":
        second.a, second.s = first.a, 2 * first.s
    with pytest.raises(dt.DeltatuneError, match=r"1\.0\.0 shares its B .* another A or scale.*gradient=\"plain\""):
        dt.LoRAFA().start(Run(net, adapter, 1))
    assert first.a.requires_grad and second.a.requires_grad
    events = dt.LoRAFA(gradient="plain").start(Run(net, adapter, 1))
    assert [p for p in adapter.parameters() if p.requires_grad] == [first.b]
    events.on_train_end(Run(net, adapter, 1))
    assert all(p.requires_grad for p in adapter.parameters())


def test_the_plain_gradient_is_that_of_lora() -> None:
    net, run, events = begin(dt.LoRAFA(gradient="plain"))
    backward(net)
    plain = unit(run).b.grad.clone()
    events.on_grads(run)
    assert torch.equal(unit(run).b.grad, plain)


def kept(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What the forward pass keeps for the backward pass beside parameters and what is made of them alone."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own and t.numel() % (x.numel() // x.shape[-1]) == 0:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return list(found.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_r_numbers_a_token_and_not_the_input(dropout: float) -> None:
    tokens = 7 * 11
    sizes = {}
    for fa in (True, False):
        net, run, events = begin(dt.LoRAFA(), torch.float32, dropout=dropout)
        if not fa:
            events.on_train_end(run)
        x = torch.randn(7, 11, IN, requires_grad=True)
        sizes[fa] = sum(t.numel() * t.element_size() for t in kept(net, x))
    assert sizes == {True: 4 * tokens * R, False: 4 * tokens * (IN + R)}


def test_a_model_keeps_an_input_less_at_every_site() -> None:
    def held(fa: bool) -> int:
        torch.manual_seed(0)
        net = tiny("llama")
        adapter = dt.attach(net, dt.LoRA(r=2, targets=dt.Part("down")))
        if fa:
            dt.LoRAFA().start(Run(net, adapter, 1))
        total: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            total[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(input_ids=torch.arange(3, 63)[None])  # kept alive, so that no address is used twice
        return sum(total.values()) if out is not None else 0

    # the down projections of two blocks read 64 numbers a token, a product that nothing else keeps
    assert held(False) - held(True) == 4 * 60 * 2 * 64


def test_peft_step_by_step() -> None:
    """PEFT's optimizer is the projection and AdamW: the same A, and the same B after every step."""
    s = 8 / 2
    torch.manual_seed(0)
    ours, theirs = tiny("llama").double(), tiny("llama").double()  # PEFT projects under bf16 autocast, but not float64
    theirs.load_state_dict(ours.state_dict())
    adapter = dt.attach(ours, dt.LoRA(r=2, alpha=8, targets=("q_proj", "v_proj")))
    other = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    factors = dict(other.named_parameters())
    for path, unit in adapter.units():
        name = f"base_model.model.{path.rpartition('.')[0]}"
        with torch.no_grad():
            factors[f"{name}.lora_A.default.weight"].copy_(unit.a)
    run = Run(ours, adapter, 4)
    events = dt.LoRAFA().start(run)
    run.optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2, eps=0,
                                      weight_decay=0.0)  # fmt: skip
    reference = create_lorafa_optimizer(other, r=2, lora_alpha=8, lr=1e-2)
    for group in reference.param_groups:  # which it adds before the bias is corrected
        group["eps"] = 0
    assert s == next(adapter.units())[1].s
    for step in range(1, 5):
        run.step = step
        batch = inputs(ours, seed=step)
        for net in (ours, other):
            net(**batch, labels=batch["input_ids"]).loss.backward()
        events.on_grads(run)
        run.optimizer.step()
        reference.step()
        run.optimizer.zero_grad()
        reference.zero_grad()
        for path, unit in adapter.units():
            name = f"base_model.model.{path.rpartition('.')[0]}"
            theirs_b = factors[f"{name}.lora_B.default.weight"]
            torch.testing.assert_close(unit.b, theirs_b, rtol=1e-5, atol=1e-7)
    assert unit.b.abs().max() > 1e-2


def test_wrong_use_is_refused() -> None:
    net = tiny("llama")
    adapter = dt.attach(net, dt.IA3())
    with pytest.raises(dt.DeltatuneError, match="product B A"):
        dt.LoRAFA().start(Run(net, adapter, 1))
    with pytest.raises(dt.DeltatuneError, match="'projected' or 'plain', got 'raw'"):
        dt.LoRAFA(gradient="raw")  # type: ignore[arg-type]
