"""LoRA and rsLoRA: what arXiv:2106.09685 and arXiv:2312.03732 say, against formulas written here in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deltatune as dt


def attached(method, module=None):
    torch.manual_seed(0)
    net = nn.Sequential(module or nn.Linear(12, 10)).double()
    return net, dt.attach(net, method)


def shake(adapter, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))


def test_the_update_is_alpha_over_r_times_b_a():
    net, adapter = attached(dt.LoRA(r=3, alpha=7, targets="0"))
    shake(adapter)
    tensors = {n.rpartition(".")[2]: p for n, p in adapter.named_parameters()}
    x = torch.randn(5, 12, dtype=torch.double)
    want = x @ net[0].weight.T + net[0].bias + (7 / 3) * (x @ tensors["a"].T) @ tensors["b"].T
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (12 + 10)
    assert torch.linalg.matrix_rank((7 / 3) * tensors["b"] @ tensors["a"]) == 3


def test_at_the_first_step_only_b_has_a_gradient():
    net, adapter = attached(dt.LoRA(r=3, targets="0"))
    net(torch.randn(5, 12, dtype=torch.double)).square().sum().backward()
    grads = {n.rpartition(".")[2]: p.grad for n, p in adapter.named_parameters()}
    assert not grads["a"].any() and grads["b"].any()


def test_scaling_one_factor_up_and_the_other_down_changes_nothing():
    net, adapter = attached(dt.LoRA(r=3, targets="0"))
    shake(adapter)
    x = torch.randn(5, 12, dtype=torch.double)
    want = net(x)
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            p.mul_(4.0 if n.endswith(".a") else 0.25)
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [1, 4, 8])
def test_rslora_is_lora_with_alpha_times_root_r(r):
    outs = []
    for method in (dt.LoRA(r=r, alpha=5, scaling="alpha/sqrt(r)", targets="0"),
                   dt.LoRA(r=r, alpha=5 * math.sqrt(r), targets="0")):  # fmt: skip
        net, adapter = attached(method)
        shake(adapter)
        outs.append(net(torch.ones(1, 12, dtype=torch.double)))
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


def test_the_first_step_of_rslora_does_not_shrink_with_the_rank():
    """One SGD step lowers the loss by eta s^2 |G A^T|^2 to first order: constant in r for rsLoRA, 1/r for LoRA."""
    gains = {}
    for scaling in ("alpha/r", "alpha/sqrt(r)"):
        for r in (4, 256):
            total = 0.0
            for seed in range(6):
                torch.manual_seed(seed)
                net = nn.Sequential(nn.Linear(512, 16, bias=False)).double()
                adapter = dt.attach(net, dt.LoRA(r=r, alpha=1, scaling=scaling, targets="0"))
                x = torch.randn(8, 512, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
                net(x).square().mean().backward()
                total += sum(float(p.grad.square().sum()) for n, p in adapter.named_parameters() if n.endswith(".b"))
            gains[scaling, r] = total
    assert gains["alpha/sqrt(r)", 256] / gains["alpha/sqrt(r)", 4] == pytest.approx(1, rel=0.15)
    assert gains["alpha/r", 256] / gains["alpha/r", 4] == pytest.approx(4 / 256, rel=0.15)


def test_a_module_has_the_rank_and_alpha_of_the_first_pattern_that_ends_its_path():
    net = nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6), "vv": nn.Linear(6, 6)})
    adapter = dt.attach(net, dt.LoRA(r=2, alpha=8, ranks={"v": 4}, alphas={"q": 2, ".*": 12}, targets=nn.Linear))
    found = {path: (len(unit.a), unit.s) for path, _, unit, _ in adapter.sites()}
    assert found == {"q": (2, 1.0), "v": (4, 3.0), "vv": (2, 6.0)}


def test_on_an_embedding_it_is_a_lookup_in_the_updated_table():
    net, adapter = attached(dt.LoRA(r=3, alpha=6, dropout=0.5, targets="0"), nn.Embedding(9, 5))
    ids = torch.tensor([[1, 8, 3], [0, 1, 1]])
    assert torch.equal(net.train()(ids), F.embedding(ids, net[0].weight))
    shake(adapter)
    tensors = {n.rpartition(".")[2]: p for n, p in adapter.named_parameters()}
    table = net[0].weight + 2 * tensors["b"] @ tensors["a"]
    torch.testing.assert_close(net.train()(ids), F.embedding(ids, table), rtol=1e-12, atol=1e-12)
    assert {t.shape for t in tensors.values()} == {(9, 3), (3, 5)}
