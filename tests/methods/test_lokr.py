"""LoKr (arXiv:2309.14859): how the weight is split, which factors are products, and PEFT's LoKr with equal weights."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lokr.layer import factorization
from tensors_made import Made
from torch import nn

import deltatune as dt
from deltatune.methods.krona import split


def shake(unit):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))


def layer(method, module=None):
    torch.manual_seed(0)
    net = nn.Sequential(module or nn.Linear(24, 40)).double()
    ((_, unit),) = dt.attach(net, method).units()
    return net, unit


def whole(unit, name):
    one = dict(unit.named_parameters())
    return one[name] if name in one else one[f"{name}_a"] @ one[f"{name}_b"]


@pytest.mark.parametrize(
    "options,shapes",
    [
        ({"r": 2}, {"w1": (5, 4), "w2_a": (8, 2), "w2_b": (2, 6)}),
        ({"r": 4}, {"w1": (5, 4), "w2": (8, 6)}),  # half the longer side: the whole is as small
        ({"r": 2, "decompose": ("w1", "w2")}, {"w1_a": (5, 2), "w1_b": (2, 4), "w2_a": (8, 2), "w2_b": (2, 6)}),
        ({"r": 1, "decompose": ()}, {"w1": (5, 4), "w2": (8, 6)}),
        ({"r": 2, "factor": 8}, {"w1": (5, 3), "w2_a": (8, 2), "w2_b": (2, 8)}),
        ({"r": 1, "factor": 3}, {"w1": (2, 3), "w2_a": (20, 1), "w2_b": (1, 8)}),
    ],
)
def test_shapes_by_rank_and_factor(options, shapes):
    net, unit = layer(dt.LoKr(targets="0", **options))
    assert {n: tuple(p.shape) for n, p in unit.named_parameters()} == shapes
    assert not whole(unit, "w2").any() and whole(unit, "w1").all()


@pytest.mark.parametrize("decompose", [(), ("w1",), ("w2",), ("w1", "w2")])
def test_the_update_is_alpha_over_r_times_the_kronecker_product_active_and_merged(decompose):
    net, unit = layer(dt.LoKr(r=2, alpha=7, decompose=decompose, targets="0"))
    shake(unit)
    delta = 7 / 2 * torch.kron(whole(unit, "w1"), whole(unit, "w2")).detach()
    x = torch.randn(3, 24, dtype=torch.double)
    want = F.linear(x, net[0].weight + delta, net[0].bias)
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    ranks = [torch.linalg.matrix_rank(whole(unit, n)) for n in ("w1", "w2")]
    assert torch.linalg.matrix_rank(delta) == ranks[0] * ranks[1]
    dt.merge(net)
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)


def test_with_whole_factors_it_is_krona():
    net, lokr = layer(dt.LoKr(r=1, alpha=1, decompose=(), targets="0"))
    other, krona = layer(dt.KronA(targets="0"))
    shake(lokr)
    with torch.no_grad():
        krona.a.copy_(lokr.w1)
        krona.c.copy_(lokr.w2)
    x = torch.randn(3, 24, dtype=torch.double)
    assert torch.equal(net(x), other(x))


def test_nothing_of_the_size_of_the_weight_is_made():
    net, unit = layer(dt.LoKr(r=2, targets="0"), nn.Linear(48, 64))
    shake(unit)
    x = torch.randn(3, 48, dtype=torch.double, requires_grad=True)
    with Made() as made:
        net(x).sum().backward()
    assert made.largest < 48 * 64 / 4 and all(p.grad.any() for p in unit.parameters())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.one_of(st.just(-1), st.integers(1, 40)))
def test_the_split_is_peft_s_but_for_the_order_where_the_factor_is_the_larger_part(n, factor):
    theirs = factorization(n, factor)
    assert split(n, factor) == (theirs if factor * factor <= n else tuple(sorted(theirs)))


KINDS = {
    "linear": (lambda: nn.Linear(24, 40), (5, 24)),
    "conv2d": (lambda: nn.Conv2d(16, 24, (3, 2), padding=1, dilation=2), (2, 16, 9, 9)),
}  # PEFT's product on a convolution of one dimension is another, see below


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"factor": 4}, {"decompose": ("w1", "w2")}, {"r": 8}], ids=str)
def test_outputs_are_peft_s(kind, options):
    made, shape = KINDS[kind]
    torch.manual_seed(0)
    module = made()
    x = torch.randn(shape)
    plain = module(x)
    ours = dt.LoKr(**{"r": 2, "alpha": 7, "targets": "0", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoKrConfig(r=ours.r, alpha=ours.alpha, decompose_both="w1" in ours.decompose,
                                 decompose_factor=ours.factor, target_modules=["0"])  # fmt: skip
        theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(module)), config).eval()
    net = nn.Sequential(module)
    ((_, unit),) = dt.attach(net, ours).units()
    shake(unit)
    tuned = theirs.base_model.model[0]
    names = {n.removeprefix("lokr_").split(".")[0] for n, _ in tuned.named_parameters() if n.startswith("lokr_")}
    assert names == {n for n, _ in unit.named_parameters()}
    with torch.no_grad():
        for n, p in unit.named_parameters():
            own = getattr(tuned, f"lokr_{n}")["default"]
            own.copy_(p.reshape(own.shape))
    got = net(x)
    torch.testing.assert_close(got, theirs(x), atol=1e-5 * got.detach().abs().max().item(), rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-2)


@pytest.mark.parametrize("decompose", [(), ("w2",)])
def test_on_a_convolution_of_one_dimension_w2_carries_the_kernel(decompose):
    """Entry (o, i, t) is w1[o // k, i // n] w2[o % k, i % n, t]."""
    net, unit = layer(dt.LoKr(r=1, alpha=3, decompose=decompose, targets="0"), nn.Conv1d(8, 12, 3, padding=1))
    shake(unit)
    w1, w2 = whole(unit, "w1"), whole(unit, "w2").reshape(4, 4, 3)
    want = torch.empty(12, 8, 3, dtype=torch.double)
    for o in range(12):
        for i in range(8):
            want[o, i] = 3 * w1[o // 4, i // 4] * w2[o % 4, i % 4]
    x = torch.randn(2, 8, 7, dtype=torch.double)
    torch.testing.assert_close(net(x), F.conv1d(x, net[0].weight + want, net[0].bias, padding=1))


@pytest.mark.parametrize("options", [{"r": 0}, {"factor": 0}, {"factor": -2}, {"decompose": ("w3",)}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(dt.DeltatuneError, match="LoKr"):
        dt.LoKr(**options)
