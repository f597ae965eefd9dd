"""The magnitudes of a low-rank linear's outputs, in its node: exact in double precision, of zeros as well."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.kernels import lowrank

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
N, IN, OUT, R = 5, 6, 7, 3
NAMES = ("x", "w", "bias", "down", "up", "magnitude")

on_each = pytest.mark.parametrize("device", DEVICES)


def tensors(device, dtype=torch.float64, trained=NAMES, n=N):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (n, IN), "w": (OUT, IN), "bias": (OUT,), "down": (R, IN), "up": (OUT, R), "magnitude": (OUT,)}
    made = {k: torch.randn(s, generator=g, dtype=dtype) for k, s in shapes.items()}
    made["magnitude"][:3] = torch.tensor([0.0, 1e-30, 1.0])
    return {k: t.to(device).requires_grad_(k in trained) for k, t in made.items()}


def fused(x, w, bias, down, up, magnitude, dropout=0.0):
    return lowrank.linear(x, w, bias, down, up, 0.7, dropout, seed=11, magnitude=magnitude)


def explicit(x, w, bias, down, up, magnitude, dropout=0.0):
    """g_o (sum_i x_i W_oi + s sum_r B_or sum_i A_ri m_i x_i / keep) + b_o, by einsum."""
    mask = torch.ones_like(x)
    if dropout:
        generator = torch.Generator(x.device).manual_seed(11)
        mask = torch.empty_like(x).bernoulli_(1 - dropout, generator=generator) / (1 - dropout)
    y = torch.einsum("ni,oi->no", x, w) + 0.7 * torch.einsum("ni,ri,or->no", x * mask, down, up)
    return magnitude * y if bias is None else magnitude * y + bias


@on_each
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_in_double_precision_where_a_magnitude_is_zero_too(dropout, biased, device):
    made = tensors(device)
    leaves = [made[k] for k in NAMES if biased or k != "bias"]

    def run(x, w, *rest):
        bias, down, up, magnitude = rest if biased else (None, *rest)
        return fused(x, w, bias, down, up, magnitude, dropout)

    assert torch.autograd.gradcheck(run, leaves)
    made["bias"] = made["bias"] if biased else None
    torch.testing.assert_close(run(*leaves), explicit(**made, dropout=dropout))


@on_each
@settings(max_examples=40, deadline=None)
@given(trained=st.sets(st.sampled_from(NAMES), min_size=1), biased=st.booleans(), dropout=st.sampled_from([0.0, 0.3]))
def test_whatever_trains_gets_its_gradient_and_nothing_else(trained, biased, dropout, device):
    made, copies = (tensors(device, trained=trained) for _ in range(2))
    g = torch.randn(N, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    for these, f in ((made, fused), (copies, explicit)):
        y = f(**these | {"bias": these["bias"] if biased else None}, dropout=dropout)
        if y.requires_grad:
            y.backward(g)
    for name, t in made.items():
        assert (t.grad is None) == (name not in trained or (name == "bias" and not biased)), name
        if t.grad is not None:
            torch.testing.assert_close(t.grad, copies[name].grad)


@on_each
def test_the_reference_and_the_pass_without_gradients_are_the_same(device):
    made = tensors(device)
    want = explicit(**made)
    torch.testing.assert_close(lowrank.reference(*(made[k] for k in NAMES[:5]), 0.7, 0.0, made["magnitude"]), want)
    for bias in (made["bias"], None):
        with torch.no_grad():
            y = fused(**made | {"bias": bias})
        torch.testing.assert_close(y, explicit(**made | {"bias": bias}).detach())


@on_each
def test_a_quantised_product_with_its_bias_in_it_is_scaled_without_it(device):
    made, copies = (tensors(device) for _ in range(2))
    w, bias = made["w"].detach(), made["bias"].detach()
    frozen = lowrank.Quantised(lambda x: torch.nn.functional.linear(x, w, bias), w.clone)
    y = fused(**made | {"w": frozen})
    want = explicit(**copies)
    torch.testing.assert_close(y, want)
    for out in (y, want):
        out.square().sum().backward()
    for name in set(NAMES) - {"w"}:
        torch.testing.assert_close(made[name].grad, copies[name].grad)


def saved(trained, device):
    made = tensors(device, torch.float32, trained, n=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(**made, dropout=0.5)
    parameters = {t.data_ptr() for t in made.values()} - {made["x"].data_ptr()}
    return sum(t.nbytes for t in kept if t.data_ptr() not in parameters)


@on_each
def test_the_output_before_scaling_is_kept_only_if_the_magnitude_trains(device):
    assert saved(["x", "down", "up", "magnitude"], device) == 64 * (IN + R + OUT) * 4
    assert saved(["x", "down", "up"], device) == 64 * (IN + R) * 4
    assert saved(["x", "magnitude"], device) == 64 * OUT * 4


@on_each
def test_a_magnitude_of_full_precision_on_a_half_precision_base(device):
    made = tensors(device, torch.float32)
    half = {k: t.detach().to(t.dtype if k == "magnitude" else torch.bfloat16) for k, t in made.items()}
    copies = {k: t.double().requires_grad_() for k, t in half.items()}
    half = {k: t.requires_grad_(k not in ("w", "bias")) for k, t in half.items()}
    y, want = fused(**half), explicit(**copies)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, atol=0.05, rtol=2e-2)
    y.float().sum().backward()
    want.sum().backward()
    assert half["magnitude"].grad.dtype == torch.float32
    torch.testing.assert_close(half["magnitude"].grad.double(), copies["magnitude"].grad, atol=0.2, rtol=2e-2)
