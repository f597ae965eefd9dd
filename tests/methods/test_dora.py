"""DoRA (arXiv:2402.09353): magnitude and direction, and the norm that the backward pass takes for a constant."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tensors_made import Made
from torch import nn

import deltatune as dt
from deltatune.methods import dora


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


def test_the_start_is_the_base_bit_for_bit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40))
    x = torch.randn(7, 48)
    want = net(x)
    dt.attach(net, dt.DoRA(targets="0"))
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [dt.LoRA(r=3), dt.LoRA(r=3, init=dt.PiSSA()), dt.LoHa(r=2)], ids=str)
def test_no_tensor_of_the_size_of_the_weight_is_made_in_a_step(dtype, inner, monkeypatch):
    monkeypatch.setattr(dora, "_ROWS", 16)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(dtype)
    adapter = dt.attach(net, dt.DoRA(inner=inner, targets=nn.Linear))
    for _, unit in adapter.units():
        shake(unit)
    x = torch.randn(5, 64, dtype=dtype)
    with Made() as made:
        net(x).float().square().sum().backward()
    assert 5 * 96 <= made.largest < 64 * 96 / 3
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_without_factors_the_norm_is_the_dense_one_and_is_counted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96))
    dt.attach(net, dt.DoRA(inner=dt.IA3(on_input=None), targets="0"))
    with Made() as made:
        net(torch.randn(5, 64))
    assert made.largest == 64 * 96


def dense_norm(w, delta, dim=1):
    return (w.double() + delta).norm(dim=dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 0.05, 1.0, 30.0])
def test_the_norm_has_the_accuracy_of_fp32_whatever_the_size_of_the_update(size, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(384, 256)).to(dtype)
    ((_, unit),) = dt.attach(net, dt.DoRA(inner=dt.LoRA(r=8), targets="0")).units()
    with torch.no_grad():
        unit.inner.b.normal_().mul_(size)
        unit.inner.a.normal_()
    want = dense_norm(net[0].weight, 2 * unit.inner.b.double() @ unit.inner.a.double())
    assert (unit.norm(net[0].weight) / want - 1).abs().max() < 1e-6


@pytest.mark.parametrize("left", [0.3, 0.1, 0.03])
def test_where_the_update_cancels_the_weight_the_error_grows_with_the_square_of_what_is_lost(left):
    """W lies in the rows of A but for a share `left`, and B A takes the rest of it off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(384, 256))
    ((_, unit),) = dt.attach(net, dt.DoRA(inner=dt.LoRA(r=8, alpha=8), targets="0")).units()
    rest = torch.randn(256, 384)
    with torch.no_grad():
        q, _ = torch.linalg.qr(unit.inner.a.T)
        b = torch.randn(256, 8)
        rest -= rest @ q @ q.T
        inside = b @ unit.inner.a
        net[0].weight.copy_(inside + left * rest / rest.norm(dim=1, keepdim=True) * inside.norm(dim=1, keepdim=True))
        unit.inner.b.copy_(-b)
    want = dense_norm(net[0].weight, unit.inner.b.double() @ unit.inner.a.double())
    lost = net[0].weight.double().norm(dim=1) / want
    assert lost.median() > 0.9 / left
    assert ((unit.norm(net[0].weight) / want - 1).abs() < 1e-6 * lost.square()).all()


def test_factors_of_full_rank_take_the_dense_norm_and_may_cancel_the_weight_altogether():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10))
    ((_, unit),) = dt.attach(net, dt.DoRA(inner=dt.LoRA(r=6, alpha=6), targets="0")).units()
    with torch.no_grad():
        unit.inner.a.copy_(torch.eye(6))
        unit.inner.b.copy_(-0.9999 * net[0].weight)
    want = dense_norm(net[0].weight, unit.inner.b.double() @ unit.inner.a.double())
    assert (unit.norm(net[0].weight) / want - 1).abs().max() < 1e-3


def test_a_row_of_zeros_stays_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40))
    with torch.no_grad():
        net[0].weight[3] = 0
    x = torch.randn(7, 48)
    want = net(x)
    ((_, unit),) = dt.attach(net, dt.DoRA(targets="0")).units()
    assert torch.equal(net(x), want)
    net(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in unit.parameters())


CHANGES = {
    "written in place": lambda net: net[0].weight.detach().mul_(3),
    "another checkpoint": lambda net: net.load_state_dict(
        {k: 3 * v for k, v in net.state_dict().items() if "adapters" not in k}, strict=False
    ),
    "another parameter": lambda net: setattr(net[0], "weight", nn.Parameter(3 * net[0].weight, requires_grad=False)),
    "another parameter in the same place": lambda net: _replace_in_place(net[0]),
    "other data": lambda net: setattr(net[0].weight, "data", 3 * net[0].weight.data),
    "cast": lambda net: net.double(),
    "rounded": lambda net: net[0].to(torch.bfloat16),
    "an optimizer": lambda net: _step(net[0].weight),
}


def _replace_in_place(layer):
    old = layer.weight
    old.data.mul_(3)  # which its version does not count
    layer.weight = nn.Parameter(old.data, requires_grad=False)
    while layer.weight._version < old._version:
        layer.weight.detach().mul_(1)
    assert layer.weight._version == old._version and layer.weight.data_ptr() == old.data_ptr()


def _step(p):
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=1.0).step()


@pytest.mark.parametrize("change", CHANGES)
def test_the_norms_kept_of_the_base_are_of_the_base_as_it_is(change):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40))
    ((_, unit),) = dt.attach(net, dt.DoRA(targets="0")).units()
    shake(unit)
    x = torch.randn(2, 48)
    net(x)
    kept = unit._kept
    assert kept is not None
    net(x)
    assert unit._kept is kept  # not computed again
    CHANGES[change](net)
    net(x.to(net[0].weight.dtype))
    a, b = unit.inner.a.double(), unit.inner.b.double()
    want = dense_norm(net[0].weight, 2 * b @ a)
    assert (unit.norm(net[0].weight) / want - 1).abs().max() < 1e-6
    assert unit._kept[2] is not kept[2]


def test_kept_norms_are_left_behind_by_copies_and_by_other_adapters():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40))
    dt.attach(net, dt.LoRA(r=2, targets="0"), "one")
    ((_, unit),) = dt.attach(net, dt.DoRA(targets="0"), "two").units()
    shake(unit)
    for _, u in dt.adapters(net)["one"].units():
        shake(u)
    x = torch.randn(2, 48)
    w = net[0].weight.detach().clone()
    alone, kept = net(x), unit._kept
    dt.activate(net, "one", "two")
    ((_, one),) = dt.adapters(net)["one"].units()
    v = w + 8 * one.b @ one.a + 2 * unit.inner.b @ unit.inner.a
    want = F.linear(x, (unit.m / v.norm(dim=1))[:, None] * v, net[0].bias)
    torch.testing.assert_close(net(x), want)
    assert unit._kept is kept  # W under the other adapter is made anew each time, so nothing of it is kept
    dt.merge(net, "one")
    dt.activate(net, "two")
    torch.testing.assert_close(net(x), want)
    dt.unmerge(net)
    assert torch.equal(net(x), alone)
    twin = copy.deepcopy(net)
    assert twin[0].adapters.units["two"][0]._kept is None and torch.equal(twin(x), alone)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert not torch.allclose(twin(x), alone) and torch.equal(net(x), alone)


def test_inference_mode_before_training_leaves_nothing_behind():
    net, unit = layer()
    shake(unit)
    x = torch.randn(4, 12, dtype=torch.double)
    with torch.inference_mode():
        want = net(x).clone()
    got = net(x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert unit.m.grad.any()


def test_a_magnitude_between_two_steps_of_half_precision_is_not_rounded_to_one_of_them():
    """bfloat16 has 1 and 1 + 2^-7: the whole output, rounded only once, moves by nearer to 0.4 of that than 0 or 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 64, bias=False)).to(torch.bfloat16)
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    base = net(x).double()
    ((_, unit),) = dt.attach(net, dt.DoRA(targets="0")).units()
    with torch.no_grad():
        unit.m.mul_(1 + 0.4 * 2**-7)
    moved = ((net(x).double() - base) * base).sum() / base.square().sum()
    assert 0.2 * 2**-7 < moved < 0.7 * 2**-7


def test_on_an_embedding_the_norm_runs_over_the_tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 12)).double()
    ((_, unit),) = dt.attach(net, dt.DoRA(inner=dt.LoRA(r=3), targets="0")).units()
    shake(unit)
    v = net[0].weight + 16 / 3 * unit.inner.b @ unit.inner.a
    ids = torch.tensor([[1, 49, 7]])
    torch.testing.assert_close(net(ids), F.embedding(ids, unit.m / v.norm(dim=0) * v), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(unit.norm(net[0].weight), v.norm(dim=0).detach(), rtol=1e-12, atol=0)
