"""DoRA of a LoRA on a linear layer: the product, its change and the magnitude are one node, and equal to the steps."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deltatune as dt
from deltatune.core.units import Base

N, IN, OUT = 40, 12, 10


def shake(unit):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))


def net(bias=True, dtype=torch.double, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias)).to(dtype)
    ((_, unit),) = dt.attach(model, dt.DoRA(inner=dt.LoRA(r=3, alpha=6, **options), targets="0")).units()
    shake(unit)
    return model, unit


@pytest.fixture
def steps(monkeypatch):
    """Call it, and the magnitude is in no product: DoRA multiplies afterwards."""
    real = Base.plus

    def plus(self, x, up, down, scale=1.0, dropout=0.0, magnitude=None):
        return real(self, x, up, down, scale, dropout) if magnitude is None else None

    return lambda: monkeypatch.setattr(Base, "plus", plus)


def run(model, unit, x):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad.clone() for p in unit.parameters())]
    model.zero_grad()
    return y, grads


@pytest.mark.parametrize("init", [None, dt.PiSSA()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_is_the_steps_in_one_node(dropout, bias, init, steps):
    model, unit = net(bias, dropout=dropout, init=init)
    x = torch.randn(2, N, IN, dtype=torch.double)
    y, grads = run(model, unit, x)
    assert y.grad_fn.name() == "_LinearBackward"
    steps()
    want, true = run(model, unit, x)
    assert want.grad_fn.name() == "AddBackward0"
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class Large(TorchDispatchMode):
    """`made`: how many tensors of the size of the output came into being, views aside."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if isinstance(y, torch.Tensor) and y.numel() == N * OUT and y.untyped_storage().data_ptr() not in given:
            self.made += 1
        return y


@pytest.mark.parametrize("bias", [False, True])
def test_it_keeps_no_more_and_passes_over_memory_less(bias, steps):
    model, _ = net(bias, dropout=0.1)
    x = torch.randn(N, IN, dtype=torch.double, requires_grad=True)

    def measured():
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
            y = model(x)
        with Large() as forward:
            model(x)
        with Large() as backward:
            y.backward(torch.ones(N, OUT, dtype=torch.double))
        return sum(t.nbytes for t in kept.values() if t.numel() >= N), forward.made, backward.made

    ours = measured()
    steps()
    theirs = measured()
    assert ours[0] <= theirs[0] and ours[1] < theirs[1] and ours[2] < theirs[2]


def test_a_base_under_another_adapter_or_stage_is_scaled_afterwards():
    model, unit = net()
    unit.inner.unload(0.5)
    x = torch.randn(4, IN, dtype=torch.double)
    want = torch.nn.functional.linear(x, unit.weight(model[0].weight), model[0].bias)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    dt.attach(model, dt.IA3(on_input=None, targets="0"), "other")
    ((_, other),) = dt.adapters(model)["other"].units()
    shake(other)
    dt.activate(model, "other", "default")
    w, b = other.weight(model[0].weight), other.bias(model[0].bias)
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, unit.weight(w), b), rtol=1e-12, atol=1e-12)


def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    model, _ = net(dtype=torch.float32)
    x = torch.randn(4, IN)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
