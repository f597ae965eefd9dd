"""The kernels against the papers' formulas, in double precision and number by number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.kernels.pointwise import rms_norm, swiglu

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

on_each = pytest.mark.parametrize("device", DEVICES)


def numbers(device, *shape, dtype=torch.float64, seed=0):
    made = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return made.to(device).requires_grad_()


@on_each
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 5), d=st.integers(1, 7), eps=st.sampled_from([1e-6, 1e-2]))
def test_an_rms_norm_number_by_number(n, d, eps, device):
    x, w = numbers(device, n, d), numbers(device, d, seed=1)
    y = rms_norm(x, w, eps)
    for i, row in enumerate(x.tolist()):
        rho = math.sqrt(sum(v**2 for v in row) / d + eps)
        assert y[i].tolist() == pytest.approx([a * b / rho for a, b in zip(row, w.tolist(), strict=True)])


@on_each
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 5), m=st.integers(1, 7))
def test_a_gated_silu_number_by_number(n, m, device):
    g, u = numbers(device, n, m), numbers(device, n, m, seed=1)
    want = [[a / (1 + math.exp(-a)) * b for a, b in zip(*rows, strict=True)]
            for rows in zip(g.tolist(), u.tolist(), strict=True)]  # fmt: skip
    for got, row in zip(swiglu(g, u).tolist(), want, strict=True):
        assert got == pytest.approx(row)


@on_each
def test_gradients(device):
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, 1e-3), (numbers(device, 2, 3, 4), numbers(device, 4, seed=1))
    )
    assert torch.autograd.gradcheck(swiglu, (numbers(device, 2, 3, 4), numbers(device, 2, 3, 4, seed=1)))
    assert torch.autograd.gradcheck(
        lambda g: swiglu(g, numbers(device, 3, 4).detach()), (numbers(device, 3, 4, seed=1),)
    )


def saved(f):
    """Bytes kept for the backward pass, those of parameters and inputs not counted."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        f()
    return kept


@on_each
def test_what_is_kept(device):
    x, w = numbers(device, 64, 8), numbers(device, 8).detach()
    others = {p: t for p, t in saved(lambda: rms_norm(x, w, 1e-6)).items() if p not in (x.data_ptr(), w.data_ptr())}
    assert [t.numel() for t in others.values()] == [64]  # a number a token
    g, u = numbers(device, 64, 8), numbers(device, 64, 8, seed=1)
    assert set(saved(lambda: swiglu(g, u))) == {g.data_ptr(), u.data_ptr()}


@on_each
def test_a_frozen_weight_gets_no_gradient_and_a_frozen_input_none(device):
    x, w = numbers(device, 3, 4), numbers(device, 4).detach()
    rms_norm(x, w, 1e-6).sum().backward()
    assert x.grad is not None and w.grad is None
    x, w = x.detach(), w.requires_grad_()
    rms_norm(x, w, 1e-6).sum().backward()
    assert w.grad is not None


@on_each
def test_half_precision_is_rounded_once_before_the_weight(device):
    x, w = numbers(device, 16, 64, dtype=torch.bfloat16), numbers(device, 64, dtype=torch.bfloat16, seed=1)
    wide = x.float()
    want = w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert (rms_norm(x, w, 1e-6) == want).float().mean() > 0.99  # a norm and a mean of squares differ in the last bit
    torch.testing.assert_close(rms_norm(x, w, 1e-6), want, rtol=2**-7, atol=0)
