"""DoRA (arXiv:2402.09353): magnitude and direction, and the norm that the backward pass takes for a constant."""

import torch
import torch.nn.functional as F
from torch import nn

import deltatune as dt


def layer(inner=None, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 10)).double()
    adapter = dt.attach(net, dt.DoRA(inner=inner or dt.LoRA(r=3, alpha=6), targets="0"))
    ((_, unit),) = adapter.units()
    return net, unit


def shake(unit):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))


def test_the_rows_of_the_merged_weight_have_the_magnitudes_as_norms():
    net, unit = layer()
    shake(unit)
    dt.merge(net)
    torch.testing.assert_close(net[0].weight.norm(dim=1), unit.m.abs().detach(), rtol=1e-12, atol=1e-12)


def test_with_no_update_the_output_is_scaled_row_by_row_but_not_the_bias():
    net, unit = layer()
    w, b = net[0].weight.detach(), net[0].bias.detach()
    with torch.no_grad():
        unit.m.mul_(torch.linspace(0.5, 2, 10, dtype=torch.double))
    x = torch.randn(4, 12, dtype=torch.double)
    torch.testing.assert_close(net(x), unit.m / w.norm(dim=1) * (x @ w.T) + b, rtol=1e-12, atol=1e-12)


def test_a_magnitude_equal_to_the_norm_leaves_plain_lora():
    net, unit = layer()
    shake(unit)
    v = net[0].weight + 2 * unit.inner.b @ unit.inner.a
    with torch.no_grad():
        unit.m.copy_(v.norm(dim=1))
    x = torch.randn(4, 12, dtype=torch.double)
    torch.testing.assert_close(net(x), F.linear(x, v, net[0].bias), rtol=1e-12, atol=1e-12)


def test_the_norm_is_a_constant_in_the_backward_pass():
    net, unit = layer()
    shake(unit)
    x = torch.randn(4, 12, dtype=torch.double)
    net(x).square().sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (unit.inner.a, unit.inner.b, unit.m))
    v = net[0].weight + 2 * b @ a
    c = v.norm(dim=1)
    for norm, equal in ((c.detach(), True), (c, False)):
        grads = torch.autograd.grad(
            (x @ ((m / norm)[:, None] * v).T + net[0].bias).square().sum(), (a, b, m), retain_graph=True
        )
        assert (
            all(torch.allclose(g, p.grad) for g, p in zip(grads, (unit.inner.a, unit.inner.b, unit.m), strict=True))
            == equal
        )


def test_any_delta_can_be_inside():
    net, unit = layer(dt.IA3(on_input=None))
    shake(unit)
    v = unit.inner.l[:, None] * net[0].weight
    want = (unit.m / v.norm(dim=1))[:, None] * v
    x = torch.randn(4, 12, dtype=torch.double)
    dt.merge(net)
    torch.testing.assert_close(net[0].weight, want.detach(), rtol=1e-12, atol=1e-12)
    assert net(x).shape == (4, 10)
