"""KronA (arXiv:2212.10650): the Kronecker product, its rank and norm, and the forward that never forms it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors_made import Made
from torch import nn

import deltatune as dt
from deltatune.methods.krona import kron_linear, split


def layer(method=None, module=None):
    torch.manual_seed(0)
    net = nn.Sequential(module or nn.Linear(12, 10)).double()
    adapter = dt.attach(net, method or dt.KronA(a=(2, 3), s=1.5, targets="0"))
    ((_, unit),) = adapter.units()
    return net, unit


def shake(unit):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))


def blocks(a, c):
    """The definition: block (i, j) of the product is A_ij C."""
    return torch.cat([torch.cat([a_ij * c for a_ij in row], 1) for row in a])


def test_the_update_is_s_times_the_blocks_a_ij_c():
    net, unit = layer()
    assert (unit.a.shape, unit.c.shape) == ((2, 3), (5, 4)) and not unit.c.any()
    shake(unit)
    x = torch.randn(7, 12, dtype=torch.double)
    want = F.linear(x, net[0].weight + 1.5 * blocks(unit.a, unit.c), net[0].bias)
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in unit.parameters()) == 2 * 3 + 5 * 4


def test_rank_and_norm_of_the_product_are_products():
    net, unit = layer(dt.KronA(targets="0"), nn.Linear(36, 36))
    shake(unit)
    delta = unit.weight(torch.zeros(36, 36, dtype=torch.double)).detach()
    assert torch.linalg.matrix_rank(delta) == 36  # of 72 parameters, as many as a LoRA of rank 1 has
    torch.testing.assert_close(delta.norm(), unit.a.norm() * unit.c.norm())
    with torch.no_grad():
        unit.a[1:] = unit.a[0]
    delta = unit.weight(torch.zeros(36, 36, dtype=torch.double)).detach()
    assert torch.linalg.matrix_rank(delta) == torch.linalg.matrix_rank(unit.c) == 6


def test_golden_number():
    """By hand: A = [1 2], C = [1; 3], x = (1, 10): y = x W' with A (x) C = [[1, 2], [3, 6]]."""
    net, unit = layer(dt.KronA(a=(1, 2), targets="0"), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.zero_()
        unit.a.copy_(torch.tensor([[1.0, 2.0]]))
        unit.c.copy_(torch.tensor([[1.0], [3.0]]))
    assert net(torch.tensor([[1.0, 10.0]], dtype=torch.double)).tolist() == [[21.0, 63.0]]


def test_nothing_of_the_size_of_the_weight_is_made():
    net, unit = layer(dt.KronA(targets="0"), nn.Linear(48, 64))
    shake(unit)
    x = torch.randn(3, 48, dtype=torch.double, requires_grad=True)
    with Made() as made:
        net(x).sum().backward()
    assert 3 * 48 <= made.largest < 48 * 64 / 4
    assert unit.a.grad.any() and unit.c.grad.any() and x.grad is not None
    with Made() as made:
        unit.weight(net[0].weight)
    assert made.largest == 48 * 64  # the count can fail


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(-1, 30).filter(bool))
def test_split_is_a_product_nearest_to_the_root(n, factor):
    small, large = split(n, factor)
    assert small * large == n and small <= large
    if factor > 0 and n % factor == 0:
        assert factor in (small, large)
    else:
        assert all(n % d or d * d > n or (0 < factor < d) for d in range(small + 1, n + 1))


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 6), st.booleans(), st.booleans())
def test_kron_linear_is_the_product_with_the_dense_matrix(sizes, left, right):
    l, m, k, n, r, rows = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.double)
    one = [draw(l, r), draw(r, m)] if left else [draw(l, m)]
    two = [draw(k, r), draw(r, n)] if right else [draw(k, n)]
    x = draw(rows, 2, m * n)
    dense = blocks(*(f[0] if len(f) == 1 else f[0] @ f[1] for f in (one, two)))
    torch.testing.assert_close(kron_linear(x, one, two), x @ dense.T)


def test_what_does_not_divide_is_refused_by_name():
    with pytest.raises(dt.DeltatuneError, match=r"'0': a=\(3, 5\) does not divide the weight \(10, 12\)"):
        layer(dt.KronA(a=(3, 5), targets="0"))
    with pytest.raises(dt.DeltatuneError, match="a is two whole numbers"):
        dt.KronA(a=(0, 4))


def test_layers_that_are_not_linear_take_the_dense_product():
    net, unit = layer(dt.KronA(targets="0"), nn.Conv2d(4, 6, 3, padding=1))
    shake(unit)
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    w = net[0].weight + blocks(unit.a, unit.c).reshape(6, 4, 3, 3)
    torch.testing.assert_close(net(x), F.conv2d(x, w, net[0].bias, padding=1))
