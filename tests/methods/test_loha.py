"""LoHa (arXiv:2108.06098, arXiv:2309.14859): the Hadamard product, its rank, its factors, and PEFT's LoHa."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from tensors_made import Made
from torch import nn

import deltatune as dt
from deltatune.methods.loha import Hadamard


def shake(unit):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))


def layer(method=None, module=None):
    torch.manual_seed(0)
    net = nn.Sequential(module or nn.Linear(30, 28)).double()
    ((_, unit),) = dt.attach(net, method or dt.LoHa(r=3, alpha=7, targets="0")).units()
    return net, unit


def product(u):
    """s (W1_a W1_b) * (W2_a W2_b), s = 7 / 3."""
    return 7 / 3 * (u.w1_a @ u.w1_b) * (u.w2_a @ u.w2_b)


def test_the_update_is_alpha_over_r_times_the_hadamard_product_of_rank_r_squared():
    net, unit = layer()
    assert not unit.w2_a.any() and sum(p.numel() for p in unit.parameters()) == 2 * 3 * (30 + 28)
    shake(unit)
    delta = product(unit).detach()
    assert torch.linalg.matrix_rank(delta) == 9
    x = torch.randn(4, 30, dtype=torch.double)
    want = F.linear(x, net[0].weight + delta, net[0].bias)
    torch.testing.assert_close(net(x), want, rtol=1e-11, atol=1e-11)
    dt.merge(net)
    torch.testing.assert_close(net(x), want, rtol=1e-11, atol=1e-11)


def test_where_one_product_is_all_ones_it_is_lora():
    net, unit = layer()
    shake(unit)
    with torch.no_grad():
        unit.w2_a.zero_()[:, 0] = 1
        unit.w2_b[0] = 1
    other = nn.Sequential(copy.deepcopy(net[0].plain_class(30, 28))).double()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k})
    ((_, lora),) = dt.attach(other, dt.LoRA(r=3, alpha=7, targets="0")).units()
    with torch.no_grad():
        lora.a.copy_(unit.w1_b)
        lora.b.copy_(unit.w1_a)
    x = torch.randn(4, 30, dtype=torch.double)
    torch.testing.assert_close(net(x), other(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("r,factored", [(3, True), (4, False)])  # 9 * 58 <= 840 < 16 * 58
def test_gradients_by_factors_and_by_the_dense_product_are_autograd_s(r, factored):
    net, unit = layer(dt.LoHa(r=r, alpha=7 * r / 3, targets="0"))
    assert unit.factored == factored
    shake(unit)
    x = torch.randn(4, 30, dtype=torch.double, requires_grad=True)
    net(x).square().sum().backward()
    got = [x.grad, *(p.grad for p in unit.parameters())]
    value = F.linear(x, net[0].weight + product(unit), net[0].bias).square().sum()
    for g, w in zip(got, torch.autograd.grad(value, (x, *unit.parameters())), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_the_recomputed_backward_pass_is_right_and_keeps_no_product():
    g = torch.Generator().manual_seed(0)
    four = [torch.randn(*s, generator=g, dtype=torch.double).requires_grad_() for s in ((5, 2), (2, 4)) * 2]
    assert torch.autograd.gradcheck(Hadamard.apply, four)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Hadamard.apply(*four)
    assert {id(t) for t in kept} <= {id(t) for t in four}


def test_by_factors_nothing_of_the_size_of_the_weight_is_made():
    net, unit = layer(dt.LoHa(r=2, targets="0"), nn.Linear(48, 64))
    shake(unit)
    x = torch.randn(3, 48, dtype=torch.double, requires_grad=True)
    with Made() as made:
        net(x).sum().backward()
    assert made.largest < 48 * 64 / 4 and all(p.grad.any() for p in unit.parameters())


def test_four_small_factors_do_not_underflow_under_half_precision_autocast():
    net, unit = layer(dt.LoHa(r=2, alpha=2, targets="0"))
    net.float()
    with torch.no_grad():
        for p in unit.parameters():
            p.fill_(1e-3)
        with torch.autocast("cpu", torch.float16):
            delta = unit.weight(torch.zeros(28, 30))
    torch.testing.assert_close(delta, torch.full((28, 30), 4e-12), rtol=1e-5, atol=0)


KINDS = {
    "linear": (lambda: nn.Linear(30, 28), (5, 30)),
    "conv1d": (lambda: nn.Conv1d(10, 12, 3, stride=2, padding=1), (2, 10, 9)),
    "conv2d": (lambda: nn.Conv2d(10, 12, (3, 2), padding=1, dilation=2), (2, 10, 9, 9)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [2, 6])  # by factors, and dense
def test_outputs_are_peft_s(kind, r):
    made, shape = KINDS[kind]
    torch.manual_seed(0)
    module = made()
    x = torch.randn(shape)
    plain = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoHaConfig(r=r, alpha=5, target_modules=["0"])
        theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(module)), config).eval()
    net = nn.Sequential(module)
    ((_, unit),) = dt.attach(net, dt.LoHa(r=r, alpha=5, targets="0")).units()
    shake(unit)
    with torch.no_grad():
        for n, p in unit.named_parameters():
            own = getattr(theirs.base_model.model[0], f"hada_{n}")["default"]
            own.copy_(p.reshape(own.shape))
    got = net(x)
    torch.testing.assert_close(got, theirs(x), atol=1e-5 * got.detach().abs().max().item(), rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_dora_decomposes_it_and_gguf_gets_its_factors():
    net, unit = layer(dt.DoRA(inner=dt.LoHa(r=3, alpha=7), targets="0"))
    shake(unit)
    v = net[0].weight + product(unit.inner)
    x = torch.randn(4, 30, dtype=torch.double)
    want = F.linear(x, (unit.m / v.norm(dim=1))[:, None] * v, net[0].bias)
    torch.testing.assert_close(net(x), want, rtol=1e-11, atol=1e-11)
    up, down = unit.inner.factors()
    torch.testing.assert_close(up @ down, product(unit.inner))


def test_a_rank_below_one_is_refused():
    with pytest.raises(dt.DeltatuneError, match="LoHa: r must be at least 1, got 0"):
        dt.LoHa(r=0)
