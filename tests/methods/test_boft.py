"""BOFT (arXiv:2311.06243): the product of factors written out densely, its pattern, dropout, sizes, and PEFT."""

import math
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from tensors_made import Made
from torch import nn

import deltatune as dt


def one(method, in_=16, dtype=torch.double, size=0.4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(in_, 5)).to(dtype)
    ((_, unit),) = dt.attach(net, method).units()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_((size * torch.randn(p.shape, generator=g, dtype=torch.double)).to(p.dtype))
    return net, unit


def cayley(row, b):
    q = torch.zeros(b, b, dtype=torch.double)
    q[tuple(torch.triu_indices(b, b, 1))] = row.detach().double()
    eye = torch.eye(b, dtype=torch.double)
    return (eye + q - q.T) @ torch.linalg.inv(eye - q + q.T)


def factor(rows, b, i, d):
    """F_i (d, d): block by block, over the coordinates that a block holds."""
    out, at, half = torch.zeros(d, d, dtype=torch.double), 0, b // 2
    for span in range(0, d, b * 2**i):
        for j in range(2**i):
            first, second = span + j * half, span + j * half + half * 2**i
            held = [*range(first, first + half), *range(second, second + half)]
            for a, row in enumerate(held):
                for c, column in enumerate(held):
                    out[row, column] = cayley(rows[at], b)[a, c]
            at += 1
    assert at == len(rows)
    return out


def dense(unit, b, d):
    """R = F_{m-1} ... F_0"""
    r = torch.eye(d, dtype=torch.double)
    for i in range(len(unit.q)):
        r = factor(unit.q[i], b, i, d) @ r
    return r


@pytest.mark.parametrize("b,m,d", [(4, 1, 16), (4, 2, 16), (4, 3, 16), (2, 4, 16), (8, 2, 48), (6, 2, 12)])
@pytest.mark.parametrize("magnitude", ["kept", "learned"])
def test_the_weight_is_turned_by_the_product_of_the_factors(b, m, d, magnitude):
    net, unit = one(dt.BOFT(block_size=b, m=m, magnitude=magnitude, targets="0"), d)
    r = dense(unit, b, d)
    torch.testing.assert_close(r.T @ r, torch.eye(d).double(), rtol=1e-12, atol=1e-12)
    w = (unit.d[:, None] if magnitude == "learned" else 1.0) * (net[0].weight @ r.T)
    torch.testing.assert_close(unit.weight(net[0].weight), w, rtol=1e-12, atol=1e-12)
    x = torch.randn(4, d, dtype=torch.double)
    torch.testing.assert_close(net(x), F.linear(x, w, net[0].bias), rtol=1e-12, atol=1e-12)
    if magnitude == "kept":
        gram = net[0].weight @ net[0].weight.T
        torch.testing.assert_close(unit.weight(net[0].weight) @ unit.weight(net[0].weight).T, gram)


def test_every_factor_doubles_what_an_output_depends_on():
    """d = 16, b = 4: dense from m = log2(2 d / b) = 3 on."""
    full = []
    for m in (1, 2, 3):
        _, unit = one(dt.BOFT(block_size=4, m=m, targets="0"))
        r = unit.turn(torch.eye(16, dtype=torch.double), unit.rotations()).detach()
        full.append(((r.abs() > 1e-12).double().mean()).item())
    assert full == [0.25, 0.5, 1.0] and math.log2(2 * 16 / 4) == 3


def test_one_factor_is_oft_and_one_block_is_cayleys_transform():
    net, unit = one(dt.BOFT(block_size=4, m=1, targets="0"))
    other = nn.Sequential(nn.Linear(16, 5)).double()
    other.load_state_dict({n: t for n, t in net.state_dict().items() if "adapters" not in n})
    ((_, oft),) = dt.attach(other, dt.OFT(block_size=4, targets="0")).units()
    oft.load_state_dict({"q": unit.q.detach()[0]})
    x = torch.randn(3, 16, dtype=torch.double)
    torch.testing.assert_close(net(x), other(x), rtol=1e-12, atol=1e-12)
    _, unit = one(dt.BOFT(block_size=16, m=1, targets="0"))
    r = unit.turn(torch.eye(16, dtype=torch.double), unit.rotations())
    torch.testing.assert_close(r, cayley(unit.q[0, 0], 16), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("b,m,d", [(8, 2, 64), (4, 5, 64), (2, 6, 64)])
def test_products_stay_orthogonal_in_single_precision(b, m, d):
    _, unit = one(dt.BOFT(block_size=b, m=m, targets="0"), d, torch.float)
    r = unit.turn(torch.eye(d), unit.rotations()).detach().double()
    assert (r.T @ r - torch.eye(d)).abs().max() < 1e-6
    torch.testing.assert_close(r, dense(unit, b, d), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dropout", [{}, {"p1": 0.5, "p2": 0.5}], ids=["plain", "dropout"])
def test_nothing_of_the_size_of_the_rotation_is_made(dropout):
    """Three factors of 32 blocks hold a tenth of what R does, and their product is never formed."""
    net, unit = one(dt.BOFT(block_size=4, m=3, magnitude="learned", targets="0", **dropout), 128)
    x = torch.randn(3, 128, dtype=torch.double, requires_grad=True)
    with Made() as made:
        net.train()(x).sum().backward()
    assert unit.rotations().numel() <= made.largest < 128 * 128 / 8
    assert unit.q.grad.any() and unit.d.grad.any() and x.grad is not None
    with Made() as made:
        unit.turn(torch.eye(128, dtype=torch.double), unit.rotations())
    assert made.largest == 128 * 128  # the count can fail


def test_counts_and_start():
    net = nn.Sequential(nn.Linear(64, 7))
    assert dt.plan(net, dt.BOFT(block_size=8, m=2, targets="0")).trained == 64 * 7 // 2 * 2
    assert dt.plan(net, dt.BOFT(block_size=4, m=5, magnitude="learned", targets="0")).trained == 64 * 3 // 2 * 5 + 7
    x = torch.randn(3, 64)
    want = net(x)
    dt.attach(net, dt.BOFT(targets="0"))
    assert torch.equal(net(x), want)


def test_gradients():
    net, unit = one(dt.BOFT(block_size=4, m=3, magnitude="learned", targets="0"))
    x = torch.randn(2, 16, dtype=torch.double, requires_grad=True)
    names = [n for n, _ in unit.named_parameters()]

    def run(x, *values):
        with torch.nn.utils.stateless._reparametrize_module(unit, dict(zip(names, values, strict=True))):
            return net(x)

    assert torch.autograd.gradcheck(run, (x, *unit.parameters()))


def test_dropout_replaces_blocks_by_the_identity_in_training_alone():
    net, unit = one(dt.BOFT(block_size=4, m=2, p1=0.5, p2=0.6, targets="0"), 64)
    r, eye = unit.rotations(), torch.eye(4, dtype=torch.double)
    assert unit.eval().dropped(r) is r
    unit.train()
    torch.manual_seed(0)
    seen = torch.stack([unit.dropped(r) for _ in range(2000)])
    off, on = (seen == eye).flatten(-2).all(-1), (seen == r).flatten(-2).all(-1)  # (draw, factor, block)
    assert (off ^ on).all()
    chosen = off.any(-1)  # a chosen factor of 16 blocks is nearly never without one
    assert chosen.double().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert off[chosen].double().mean().item() == pytest.approx(0.6, abs=0.02)
    x = torch.randn(2, 64, dtype=torch.double)
    assert not torch.equal(net.train()(x), net(x)) and torch.equal(net.eval()(x), net(x))
    want = F.linear(x, unit.train().weight(net[0].weight), net[0].bias)
    torch.testing.assert_close(net.eval()(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options,words", [
    ({"block_size": 8, "m": 3}, "24 inputs, no multiple of .* = 32 .*give m=1"),
    ({"block_size": 16, "m": 1}, "another block_size"),
    ({"block_size": 4, "m": 3}, "give m=2"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(options, words):
    net = nn.Sequential(nn.Linear(24, 4))
    with pytest.raises(dt.DeltatuneError, match=words):
        dt.attach(net, dt.BOFT(targets="0", **options))
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize(
    "options", [{"block_size": 3}, {"m": 0}, {"p1": 2.0}, {"p2": 1.0}, {"magnitude": "x"}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(dt.DeltatuneError, match=next(iter(options))):
        dt.BOFT(**options)


class Blocks:
    """What PEFT's CUDA extension computes: (n, blocks, b, b) -> n block-diagonal matrices."""

    @staticmethod
    def apply(c):
        return torch.stack([torch.block_diag(*one) for one in c])


@pytest.mark.parametrize("m", [1, 2, 3])
def test_peft_computes_the_same(m, monkeypatch):
    """PEFT's blocks turn the other way, and without its extension it has one factor only."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Blocks)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", Blocks)
    net, unit = one(dt.BOFT(block_size=4, m=m, magnitude="learned", targets="0"), dtype=torch.float)
    base = nn.Sequential(nn.Linear(16, 5))
    base.load_state_dict({n: t for n, t in net.state_dict().items() if "adapters" not in n})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=m, target_modules=["0"])
        theirs = peft.get_peft_model(base, config).eval()
    parameters = {n.split(".")[-2]: p for n, p in theirs.named_parameters() if p.requires_grad}
    rows, columns = torch.triu_indices(4, 4, 1)
    with torch.no_grad():
        parameters["boft_R"].copy_(torch.randn(m, 4, 4, 4))  # PEFT stores whole blocks and takes what is skew of them
        whole = parameters["boft_R"]
        unit.q.copy_(-0.5 * (whole - whole.mT)[..., rows, columns])
        parameters["boft_s"].copy_(unit.d[:, None])
    x = torch.randn(3, 16)
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-5, atol=1e-5)
