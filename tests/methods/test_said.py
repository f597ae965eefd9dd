"""Intrinsic SAID: the Fastfood projection against its matrices, the one trained vector, and a reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.inits.seeded import normal, permutation, signs
from deltatune.methods.said import Fastfood, Projected, Subspace, walsh_hadamard
from deltatune.models.tiny import inputs, tiny

CPU = torch.device("cpu")
GOLDEN = [-0.237641151, 2.736899237, 2.845969234, -1.180431863, -0.92973778, 3.096663317]


def fastfood(dim: int, size: int, key: str = "k") -> tuple[Fastfood, Tensor]:
    return Fastfood(dim, size, key, torch.double, CPU), Subspace(dim, dtype=torch.double).h


def hadamard(n: int) -> Tensor:
    """(-1) to the number of ones that i and j have in common."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.double)


def matrix(dim: int, size: int, key: str = "k") -> Tensor:
    """P, (size, dim): H G Pi H B / c with all its factors written out as N x N matrices."""
    n = 1
    while n < max(dim, size):
        n *= 2
    h, g = hadamard(n), normal(f"{key}/G", n, CPU).double()
    pi = torch.zeros(n, n, dtype=torch.double)
    for i, j in enumerate(permutation(f"{key}/Pi", n, CPU).tolist()):
        pi[i, j] = 1
    b = torch.zeros(n, dtype=torch.double)
    b[:dim] = signs(f"{key}/B", dim, CPU).double()  # beyond `dim`, B meets zeros
    whole = h @ g.diag() @ pi @ h @ b.diag()
    return (whole / math.sqrt(n * float(g.square().sum())) / math.sqrt(size / n))[:size, :dim]


@pytest.mark.parametrize("n", [1, 2, 8, 128, 256, 1024])
def test_the_fast_transform_is_the_hadamard_matrix(n: int) -> None:
    x, (_, h) = torch.randn(n, dtype=torch.double), fastfood(2, 2)
    torch.testing.assert_close(walsh_hadamard(x, h), hadamard(n) @ x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dim", "size"), [(5, 12), (8, 8), (3, 200), (40, 24), (1, 7), (100, 300)])
def test_the_projection_is_the_product_of_its_matrices(dim: int, size: int) -> None:
    """Also where v is longer than the weight has entries."""
    project, h = fastfood(dim, size)
    got = torch.stack([project(e, h) for e in torch.eye(dim, dtype=torch.double)], 1)
    torch.testing.assert_close(got, matrix(dim, size), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dim", "size"), [(5, 12), (40, 24)])
def test_its_backward_pass_is_the_transpose(dim: int, size: int) -> None:
    project, h = fastfood(dim, size)
    v, g = torch.randn(dim, dtype=torch.double, requires_grad=True), torch.randn(size, dtype=torch.double)
    (back,) = torch.autograd.grad(project(v, h) @ g, v)
    torch.testing.assert_close(back, matrix(dim, size).T @ g, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda u: project(u, h), (v,))
    assert torch.autograd.gradgradcheck(lambda u: project(u, h).square(), (v,))


def test_it_keeps_the_norm_on_average() -> None:
    ratios = []
    for i in range(60):
        project, h = fastfood(64, 700, f"{i}")
        v = torch.randn(64, dtype=torch.double, generator=torch.Generator().manual_seed(i))
        ratios.append(float(project(v, h).square().sum() / v.square().sum()))
    assert sum(ratios) / 60 == pytest.approx(1, abs=0.05)
    assert min(ratios) > 0.5 and max(ratios) < 1.6


def test_golden_numbers() -> None:
    """What files written today must be read with: P of the key "golden", from its matrices in float64."""
    project, h = fastfood(3, 6, "golden")
    v = torch.tensor([1.0, -2.0, 3.0], dtype=torch.double)
    want = torch.tensor(GOLDEN, dtype=torch.double)
    torch.testing.assert_close(project(v, h), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix(3, 6, "golden") @ v, want, rtol=1e-6, atol=1e-6)


def two(**options: object) -> tuple[nn.Sequential, dt.Adapter]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    return net, dt.attach(net, dt.SAID(**{"d": 12, "targets": nn.Linear} | options))


def test_d_values_train_and_one_vector_moves_all_sites() -> None:
    net, adapter = two()
    named = dict(adapter.named_parameters())
    assert sum(p.numel() for p in named.values()) == 12
    assert {n: p.numel() for n, p in named.items()} == {"shared.0.v": 10, "0.0.scale": 1, "2.0.scale": 1}
    x = torch.randn(5, 6, dtype=torch.double)
    net(x).square().sum().backward()
    assert named["shared.0.v"].grad.all() and not named["0.0.scale"].grad.any()  # v = 0, l = 1
    with torch.no_grad():
        named["shared.0.v"].copy_(torch.linspace(-1, 2, 10))
        named["2.0.scale"].fill_(-0.5)
    w = []
    for path, scale in (("0", 1.0), ("2", -0.5)):
        layer = net.get_submodule(path)
        p = matrix(10, layer.weight.numel(), f"said/0/{path}.weight")
        w.append(layer.weight + scale * (p @ named["shared.0.v"]).view_as(layer.weight))
    want = torch.tanh(x @ w[0].T + net[0].bias) @ w[1].T + net[2].bias
    torch.testing.assert_close(net(x), want, rtol=1e-11, atol=1e-11)


def test_sites_seeds_and_pieces_of_a_fused_projection_have_their_own_projection() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 18))
    fused = dt.Fused(targets="1", sizes=(1, 1, 1), take=(0, 1, 2))
    drawn = []
    for seed in (0, 1):
        adapter = dt.attach(net, dt.SAID(d=20, seed=seed, targets=("0", fused)), f"a{seed}")
        drawn += [m.g for _, u in adapter.units() for m in u.modules() if isinstance(m, Fastfood)]
    assert len(drawn) == 8
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_file_holds_d_values_and_gives_the_same_outputs(tmp_path) -> None:
    net = tiny("gpt2")
    batch = inputs(net)
    adapter = dt.attach(net, dt.SAID(d=150, seed=5))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape))
    want = net(**batch).logits
    adapter.save(tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == 150
    dt.detach(net)
    assert not torch.allclose(net(**batch).logits, want, atol=1e-2)
    dt.load(net, tmp_path)
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-6, atol=1e-6)


def test_the_difference_is_linear_in_the_vector() -> None:
    net, adapter = two(d=30)
    unit = next(u for _, u in adapter.units() if isinstance(u, Projected))
    w = net[0].weight.detach()
    with torch.no_grad():
        unit.subspace.v.copy_(torch.randn(28))
        once = unit.weight(w) - w
        unit.subspace.v.mul_(2)
    torch.testing.assert_close(unit.weight(w) - w, 2 * once, rtol=1e-10, atol=1e-12)


def test_d_must_leave_room_beside_the_scales() -> None:
    with pytest.raises(dt.DeltatuneError, match="d=2 leaves nothing beside one scale for each of 2 sites"):
        two(d=2)
