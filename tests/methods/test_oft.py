"""OFT (arXiv:2306.07280) against Cayley's formula in float64: rotations, what they keep, sizes, and PEFT."""

import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltatune as dt
from deltatune.methods.oft import blockwise, skew


def one(method, module=None, dtype=torch.double, size=0.4):
    """(net, unit, its base weight and bias) of a layer with random rotations."""
    torch.manual_seed(0)
    net = nn.Sequential(module or nn.Linear(12, 10)).to(dtype)
    ((_, unit),) = dt.attach(net, method).units()
    shake(unit, size)
    return net, unit


def shake(unit, size=0.4):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_((size * torch.randn(p.shape, generator=g, dtype=torch.double)).to(p.dtype))


def dense(q, size, blocks):
    """R (in, in) in float64, entry by entry: Q from its upper triangle, (I + Q)(I - Q)^-1 by an explicit inverse."""
    parts = []
    for row in q.detach().double():
        big_q, n = torch.zeros(size, size, dtype=torch.double), 0
        for i in range(size):
            for j in range(i + 1, size):
                big_q[i, j], big_q[j, i], n = row[n], -row[n], n + 1
        eye = torch.eye(size, dtype=torch.double)
        parts.append((eye + big_q) @ torch.linalg.inv(eye - big_q))
    return torch.block_diag(*(parts * blocks if len(parts) == 1 else parts))


@pytest.mark.parametrize("magnitude", ["kept", "learned"])
@pytest.mark.parametrize("blocks", ["own", "shared"])
def test_the_weight_is_turned_by_a_block_diagonal_cayley_rotation(blocks, magnitude):
    net, unit = one(dt.OFT(block_size=4, blocks=blocks, magnitude=magnitude, targets="0"))
    r = dense(unit.q, 4, 3)
    d = unit.d[:, None] if magnitude == "learned" else 1.0
    want = d * (net[0].weight @ r.T)
    torch.testing.assert_close(unit.weight(net[0].weight), want, rtol=1e-12, atol=1e-12)
    x = torch.randn(5, 3, 12, dtype=torch.double)
    torch.testing.assert_close(net(x), F.linear(x, want, net[0].bias), rtol=1e-12, atol=1e-12)
    if magnitude == "kept":  # the paper's z = (R W)^T x + b, with its W (in, out)
        z = torch.stack([(r @ net[0].weight.T).T @ row + net[0].bias for row in x.flatten(0, 1)])
        torch.testing.assert_close(net(x).flatten(0, 1), z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size,scale", [(2, 1.0), (16, 0.02), (32, 0.3), (96, 0.1)])
def test_single_precision_blocks_are_rotations(size, scale):
    _, unit = one(dt.OFT(block_size=size, targets="0"), nn.Linear(96, 5), torch.float, scale)
    r = unit.rotations().detach()
    assert r.dtype == torch.float
    eye = torch.eye(size, dtype=torch.double)
    gram = r.double().mT @ r.double()
    assert (gram - eye).abs().max() < 1e-6
    want = dense(unit.q, size, 1)
    torch.testing.assert_close(torch.block_diag(*r).double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.linalg.det(r.double()), torch.ones(len(r)).double(), rtol=0, atol=1e-5)


def test_autocast_and_a_bf16_adapter_do_not_cost_orthogonality():
    _, unit = one(dt.OFT(block_size=8, targets="0"), nn.Linear(32, 5), torch.float)
    with torch.autocast("cpu", torch.bfloat16):
        r = unit.rotations()
    assert torch.equal(r, unit.rotations())
    r = unit.bfloat16().rotations()
    assert (r.mT @ r - torch.eye(8)).abs().max() < 1e-6


def test_neurons_keep_their_norms_and_angles():
    net, unit = one(dt.OFT(block_size=6, targets="0"))
    w = net[0].weight.detach()
    turned = unit.weight(w).detach()
    assert (turned - w).abs().max() > 0.1
    torch.testing.assert_close(turned @ turned.T, w @ w.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(w), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned @ dense(unit.q, 6, 2), w, rtol=1e-12, atol=1e-12)  # the inverse is R


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(dtype):
    net = nn.Sequential(nn.Linear(64, 7)).to(dtype)
    x = torch.randn(3, 64, dtype=dtype)
    want = net(x)
    ((_, unit),) = dt.attach(net, dt.OFT(targets="0")).units()
    assert torch.equal(net(x), want) and torch.equal(unit.weight(net[0].weight), net[0].weight.float())


def test_parameter_counts():
    count = lambda **o: dt.plan(nn.Sequential(nn.Linear(128, 128)), dt.OFT(targets="0", **o)).trained
    assert count(block_size=16) == 960  # 128 x 128 with 8 blocks, for which LoRA of rank 8 takes 2048
    assert count(block_size=16, blocks="shared") == 16 * 15 // 2
    assert count(block_size=16, magnitude="learned") == 960 + 128
    assert count(block_size=128) == 128 * 127 // 2


@pytest.mark.parametrize("blocks,magnitude", [("own", "kept"), ("shared", "learned")])
def test_gradients(blocks, magnitude):
    net, unit = one(dt.OFT(block_size=4, blocks=blocks, magnitude=magnitude, targets="0"), nn.Linear(8, 3))
    x = torch.randn(2, 8, dtype=torch.double, requires_grad=True)
    names = [n for n, _ in unit.named_parameters()]

    def run(x, *values):
        with torch.nn.utils.stateless._reparametrize_module(unit, dict(zip(names, values, strict=True))):
            return net(x)

    assert torch.autograd.gradcheck(run, (x, *unit.parameters()))


@pytest.mark.parametrize("conv", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2, padding=1)])
def test_a_kernel_is_turned_flattened(conv):
    size = 6 if isinstance(conv, nn.Conv1d) else 9
    net, unit = one(dt.OFT(block_size=size, targets="0"), conv)
    w = net[0].weight.flatten(1) @ dense(unit.q, size, 1).T
    twin = type(conv)(4, 6, 3, groups=conv.groups, padding=conv.padding).double()
    twin.load_state_dict({"weight": w.view_as(conv.weight), "bias": net[0].bias})
    x = torch.randn(2, 4, *[7] * (conv.weight.ndim - 2), dtype=torch.double)
    torch.testing.assert_close(net(x), twin(x), rtol=1e-10, atol=1e-10)


def test_an_embedding_is_turned_row_by_row():
    net, unit = one(dt.OFT(block_size=4, targets="0"), nn.Embedding(9, 8))
    ids = torch.tensor([[1, 8], [0, 1]])
    want = F.embedding(ids, net[0].weight) @ dense(unit.q, 4, 2).T
    torch.testing.assert_close(net(ids), want, rtol=1e-12, atol=1e-12)


def test_blocks_are_applied_without_a_dense_matrix():
    torch.manual_seed(0)
    x, r = torch.randn(4, 12).double(), torch.randn(3, 4, 4).double()
    torch.testing.assert_close(blockwise(x, r), x @ torch.block_diag(*r))
    torch.testing.assert_close(blockwise(x, r[:1]), x @ torch.block_diag(r[0], r[0], r[0]))
    assert torch.equal(skew(torch.tensor([1.0, 2.0, 3.0]), 3), torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]))


@pytest.mark.parametrize("in_,words", [(50, "50 inputs.*block_size=32.*give 25 or 50"), (1, "leave it out")])
def test_a_size_that_no_block_divides_is_refused_with_those_that_do(in_, words):
    net = nn.Sequential(nn.Linear(in_, 4))
    with pytest.raises(dt.DeltatuneError, match=words):
        dt.attach(net, dt.OFT(targets="0"))
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("options", [{"block_size": 1}, {"blocks": "one"}, {"magnitude": "free"}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(dt.DeltatuneError, match=next(iter(options))):
        dt.OFT(**options)


@pytest.mark.parametrize("shared", [False, True])
def test_peft_computes_the_same(shared):
    """Its exact Cayley is (I - Q)(I + Q)^-1, the opposite rotation."""
    base = nn.Sequential(nn.Linear(16, 6))
    net = nn.Sequential(nn.Linear(16, 6))
    net.load_state_dict(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.OFTConfig(oft_block_size=4, block_share=shared, use_cayley_neumann=False, target_modules=["0"])
        theirs = peft.get_peft_model(base, config).eval()
    method = dt.OFT(block_size=4, blocks="shared" if shared else "own", targets="0")
    ((_, unit),) = dt.attach(net, method).units()
    shake(unit)
    (q,) = (p for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        q.copy_(-unit.q)
    x = torch.randn(3, 16)
    assert (net(x) - base[0].base_layer(x)).abs().max() > 0.1
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-5, atol=1e-5)
