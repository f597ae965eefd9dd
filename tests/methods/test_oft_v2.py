"""OFTv2 (arXiv:2506.19847): the Neumann series against Cayley's inverse, quantised bases, and PEFT."""

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltatune as dt
from deltatune.methods.oft import skew
from deltatune.storage import layers


def one(k, size=0.05, dtype=torch.double, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 5)).to(dtype)
    ((_, unit),) = dt.attach(net, dt.OFTv2(block_size=8, k=k, targets="0", **options)).units()
    with torch.no_grad():
        unit.q.copy_(size * torch.randn(unit.q.shape, dtype=dtype))
    return net, unit


def exact(unit):
    """(Q, Cayley's R) block by block, in float64."""
    q = skew(unit.q.detach().double(), 8)
    eye = torch.eye(8, dtype=torch.double)
    return q, torch.stack([(eye + b) @ torch.linalg.inv(eye - b) for b in q])


def defect(unit):
    r = unit.rotations().detach()
    return (r.mT @ r - torch.eye(8, dtype=r.dtype)).abs().max().item()


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_the_series_is_cayleys_rotation_but_for_a_power(k):
    _, unit = one(k, 0.2)
    q, cayley = exact(unit)
    power = lambda n: torch.linalg.matrix_power(q, n)
    r = unit.rotations().detach()
    terms = sum((2 * power(i) for i in range(1, k + 1)), torch.eye(8).double()) + power(k + 1)
    torch.testing.assert_close(r, terms, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(r, cayley @ (torch.eye(8).double() - power(k + 1)), rtol=1e-12, atol=1e-12)
    gram = -power(k + 1) - power(k + 1).mT + power(k + 1).mT @ power(k + 1)
    torch.testing.assert_close(r.mT @ r, torch.eye(8) + gram, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k,order,size", [(1, 2, 2e-3), (2, 6, 0.05), (3, 4, 2e-3), (4, 10, 0.05), (5, 6, 0.01)])
def test_even_k_is_orthogonal_to_twice_the_order(k, order, size):
    big, small = defect(one(k, size)[1]), defect(one(k, size / 2)[1])
    assert big / small == pytest.approx(2**order, rel=0.01)


def test_default_blocks_are_orthogonal_to_single_precision():
    net = nn.Sequential(nn.Linear(64, 5))
    ((_, unit),) = dt.attach(net, dt.OFTv2(targets="0")).units()
    with torch.no_grad():
        unit.q.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    r = unit.rotations().double()
    assert (r.mT @ r - torch.eye(32)).abs().max() < 1e-6 and (r - torch.eye(32)).abs().max() > 0.02
    assert unit.q.numel() == 64 * 31 // 2


def test_more_terms_come_to_oft():
    w = torch.randn(5, 16, dtype=torch.double)
    _, unit = one(40, 0.05)
    assert torch.linalg.matrix_norm(exact(unit)[0], 2).max() < 0.5
    want = w @ torch.block_diag(*exact(unit)[1]).T
    torch.testing.assert_close(unit.weight(w), want, rtol=1e-11, atol=1e-11)


def test_the_start_is_the_base_bit_for_bit():
    net, unit = one(4, 0.0, torch.float)
    x = torch.randn(3, 16)
    assert torch.equal(net(x), F.linear(x, net[0].weight, net[0].bias))


def test_gradients():
    net, unit = one(4)
    x = torch.randn(2, 16, dtype=torch.double, requires_grad=True)

    def run(x, q):
        with torch.nn.utils.stateless._reparametrize_module(unit, {"q": q}):
            return net(x)

    assert torch.autograd.gradcheck(run, (x, unit.q))


class Int8(nn.Linear):
    """A linear layer that holds int8 values and a scale for each row."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        w, self.bias, self.reads = linear.weight.detach(), linear.bias, 0
        self.scale = nn.Parameter(w.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.weight = nn.Parameter((w / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


def _read(module, name):
    module.reads += 1
    return module.weight * module.scale


def test_a_quantised_base_is_never_dequantised_by_us(monkeypatch):
    monkeypatch.setitem(layers._LAYERS, Int8, layers.Layer(layers.LINEAR, read=_read))
    torch.manual_seed(0)
    net = nn.Sequential(Int8(nn.Linear(16, 6)))
    dense = nn.Sequential(nn.Linear(16, 6))
    dense[0].weight, dense[0].bias = nn.Parameter(_read(net[0], "weight")), net[0].bias
    method = dt.OFTv2(block_size=8, magnitude="learned", targets="0")
    ((_, unit),), ((_, twin),) = dt.attach(net, method).units(), dt.attach(dense, method).units()
    for u in (unit, twin):
        with torch.no_grad():
            u.q.copy_(torch.linspace(-0.1, 0.2, u.q.numel()).view_as(u.q))
    net[0].reads, x = 0, torch.randn(4, 16)
    y = net(x)
    y.square().sum().backward()
    assert net[0].reads == 0 and unit.q.grad.abs().min() > 0
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(y, F.linear(x, unit.weight(_read(net[0], "weight")), net[0].bias))


def test_the_last_power_is_at_least_one():
    with pytest.raises(dt.DeltatuneError, match="k must be at least 1, got 0"):
        dt.OFTv2(k=0)


@pytest.mark.parametrize("terms,k", [(3, 2), (4, 2), (5, 3), (6, 4), (8, 6)])
def test_peft_counts_the_terms_otherwise(terms, k):
    net, unit = one(k, 0.2, torch.float)
    base = nn.Sequential(nn.Linear(16, 5))
    base.load_state_dict({n: t for n, t in net.state_dict().items() if "adapters" not in n})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=terms, target_modules=["0"])
        theirs = peft.get_peft_model(base, config).eval()
    (q,) = (p for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        q.copy_(unit.q)
    x = torch.randn(3, 16)
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-5, atol=1e-5)
