"""Compacter, Compacter++ and PHM adapters: sums of Kronecker products, what they share, and how little there is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.compacter import Bottleneck, LowRankPHM
from deltatune.models.tiny import inputs, tiny


def randomise(adapter: dt.Adapter, std: float = 0.5) -> dt.Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return adapter


def bottlenecks(adapter: dt.Adapter) -> list[Bottleneck]:
    return [u for _, u in adapter.units() if isinstance(u, Bottleneck)]


def on_a_layer(method: dt.PHMAdapter, d: int = 8) -> tuple[nn.Module, dt.Adapter, Bottleneck]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, d)).double()
    adapter = randomise(dt.attach(model, method))
    return model, adapter, bottlenecks(adapter)[0]


def kron_sum(layer: nn.Module) -> Tensor:
    """H (in, out), term by term."""
    a = layer.rules.a
    b = [s @ t for s, t in zip(layer.s, layer.t, strict=True)] if isinstance(layer, LowRankPHM) else layer.b
    return sum(torch.kron(a[i], b[i]) for i in range(len(a)))


@pytest.mark.parametrize(
    "method",
    [
        dt.Compacter(size=4, n=2, targets="0", norms=None),
        dt.Compacter(size=8, n=4, k=3, targets="0", norms=None),
        dt.CompacterPlusPlus(size=4, n=4, targets="0", norms=None),
        dt.PHMAdapter(size=4, n=2, targets="0", norms=None),
        dt.PHMAdapter(size=8, n=8, targets="0", norms=None),
    ],
    ids=["k=1", "k=3", "plus plus", "phm", "phm, n=8"],
)
def test_is_the_sum_of_kronecker_products(method: dt.PHMAdapter) -> None:
    model, _, unit = on_a_layer(method)
    x = torch.randn(2, 3, 5, dtype=torch.double)
    u = F.linear(x, model[0].weight, model[0].bias)
    h = u @ kron_sum(unit.down) + unit.down.bias
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    want = u + gelu @ kron_sum(unit.up) + unit.up.bias
    torch.testing.assert_close(model(x), want, atol=1e-11, rtol=1e-11)
    assert (model(x) - u).abs().max() > 0.1


def test_of_one_term_is_a_low_rank_linear_layer() -> None:
    _, _, unit = on_a_layer(dt.Compacter(size=6, n=1, k=2, targets="0", norms=None))
    with torch.no_grad():
        unit.down.rules.a.fill_(1)
    x = torch.randn(3, 8, dtype=torch.double)
    torch.testing.assert_close(unit.down(x), x @ unit.down.s[0] @ unit.down.t[0] + unit.down.bias)


def test_a_term_has_rank_at_most_n_k() -> None:
    _, _, unit = on_a_layer(dt.Compacter(size=16, n=4, k=1, targets="0", norms=None), d=16)
    a, s, t = unit.down.rules.a[0], unit.down.s[0], unit.down.t[0]
    assert torch.linalg.matrix_rank(torch.kron(a, s @ t)) == 4
    assert torch.linalg.matrix_rank(kron_sum(unit.down)) == 16  # the sum of four is of full rank


@pytest.mark.parametrize("family,positions", [("llama", 4), ("bert", 4), ("t5", 8), ("bart", 10)])
def test_positions_and_one_set_of_rules_for_all(family: str, positions: int) -> None:
    model = tiny(family)
    adapter = dt.attach(model, dt.Compacter(size=8, n=4, norms=None))
    units, plus = bottlenecks(adapter), dt.plan(model, dt.CompacterPlusPlus(size=8, n=4, norms=None))
    assert len(units) == positions and len(plus.sites) == positions // 2
    assert len({id(layer.rules.a) for u in units for layer in (u.down, u.up)}) == 1
    each = 2 * (32 + 8) + 32 + 8  # 2 k (d + m) + d + m
    assert sum(p.numel() for p in adapter.parameters()) == 4**3 + positions * each
    assert plus.trained == 4**3 + positions // 2 * each
    assert [n for n, _ in adapter.named_parameters() if n.startswith("shared")] == ["shared.0.a"]


def test_size_of_the_paper() -> None:
    """d = 768, m = 24, n = 4, k = 1: 2,376 values an adapter, and 64 for all."""
    model = nn.Sequential(nn.Linear(4, 768), nn.Linear(768, 768))
    assert dt.plan(model, dt.Compacter(targets=("0", "1"), norms=None)).trained == 2 * 2376 + 64


def test_norms_train_as_well() -> None:
    model = tiny("bert")
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    plain, more = (dt.plan(model, dt.Compacter(size=4, n=4, norms=s)).trained for s in (None, dt.core.Part("norm")))
    assert more - plain == norms


def test_phm_adapters_have_rules_of_their_own_and_whole_factors() -> None:
    adapter = dt.attach(tiny("gpt2"), dt.PHMAdapter(size=8, n=2, norms=None))
    units = bottlenecks(adapter)
    assert len({id(layer.rules.a) for u in units for layer in (u.down, u.up)}) == 2 * len(units)
    assert sum(p.numel() for p in adapter.parameters()) == len(units) * (2 * (2**3 + 32 * 8 // 2) + 32 + 8)


def test_changing_the_rules_changes_every_adapter_and_their_gradients_add_up() -> None:
    torch.manual_seed(0)
    model = tiny("llama").double()
    adapter = randomise(dt.attach(model, dt.Compacter(size=8, n=4, norms=None)), 0.3)
    twin = copy.deepcopy(model)
    rules = {id(u.down.rules) for u in bottlenecks(dt.adapters(twin)["default"])}
    assert len(rules) == 1  # in a copy too
    for u in bottlenecks(dt.adapters(twin)["default"]):  # each with its own, equal ones
        u.down.rules, u.up.rules = copy.deepcopy(u.down.rules), copy.deepcopy(u.up.rules)
    for net in (model, twin):
        net(**inputs(net)).logits.square().mean().backward()
    own = [layer.rules.a.grad for u in bottlenecks(dt.adapters(twin)["default"]) for layer in (u.down, u.up)]
    torch.testing.assert_close(adapter.record.shared["0"].a.grad, sum(own))
    x = torch.randn(2, 32, dtype=torch.double)
    before = [u.down(x) for u in bottlenecks(adapter)]
    with torch.no_grad():
        adapter.record.shared["0"].a.add_(1)
    assert not any(torch.allclose(b, u.down(x)) for b, u in zip(before, bottlenecks(adapter), strict=True))


def test_starts_near_the_base() -> None:
    """Slices of S, T of variance 4 / (fan in + fan out), A of deviation 1e-4: what is added to u is next to nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 768))
    (unit,) = bottlenecks(dt.attach(model, dt.Compacter(k=2, targets="0", norms=None)))
    assert unit.down.s.shape == (4, 192, 2) and unit.up.t.shape == (4, 2, 192)
    for p in (unit.down.s, unit.up.t):
        assert abs(p.std() / math.sqrt(4 / 194) - 1) < 0.1 and p.abs().max() <= math.sqrt(2) * math.sqrt(6 / 194)
    assert 0.7e-4 < unit.down.rules.a.std() < 1.3e-4
    x = torch.randn(50, 4)
    u = F.linear(x, model[0].weight, model[0].bias)
    assert 0 < (model(x) - u).norm() / u.norm() < 1e-5


def test_the_start_of_a_phm_adapter() -> None:
    (unit,) = bottlenecks(dt.attach(nn.Sequential(nn.Linear(4, 64)), dt.PHMAdapter(size=16, targets="0", norms=None)))
    assert 0.006 < unit.up.rules.a.std() < 0.014
    assert abs(unit.down.b.std() / math.sqrt(4 / (16 + 4)) - 1) < 0.15


@pytest.mark.parametrize(
    "options,told",
    [
        ({"size": 10}, "size=10, n=4, k=1: .* n divides size"),
        ({"n": 0}, "size=24, n=0, k=1: all >= 1"),
        ({"k": 0}, "size=24, n=4, k=0: all >= 1"),
    ],
)
def test_options_are_checked(options: dict[str, int], told: str) -> None:
    with pytest.raises(dt.DeltatuneError, match=f"Compacter: {told}"):
        dt.Compacter(**options)


def test_n_divides_the_width() -> None:
    with pytest.raises(dt.DeltatuneError, match=r"PHMAdapter: '0': n=3 does not divide the width 4"):
        dt.attach(nn.Sequential(nn.Linear(4, 4)), dt.PHMAdapter(size=3, n=3, targets="0", norms=None))
