"""VeRA: what arXiv:2310.11454 says, one pair of matrices for all sites, and PEFT."""

from __future__ import annotations

import copy
import math
from hashlib import blake2b

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.inits.seeded import normal, permutation, signs, uniform
from deltatune.methods.vera import Vectors
from deltatune.models.tiny import inputs, tiny


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7), nn.Linear(7, 10, bias=False)).double()


def shake(adapter: dt.Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def units(adapter: dt.Adapter) -> list[Vectors]:
    return [u for _, u in adapter.units()]  # type: ignore[misc]


def test_each_site_scales_rows_and_columns_of_the_shared_pair() -> None:
    net = layers()
    adapter = dt.attach(net, dt.VeRA(r=4, targets=nn.Linear))
    shake(adapter)
    for layer, unit in zip(net, units(adapter), strict=True):
        shared, (out, in_) = unit.projections, layer.weight.shape
        want = torch.zeros(out, in_, dtype=torch.double)
        for i in range(out):
            for j in range(in_):
                for k in range(4):
                    want[i, j] += unit.b[i] * shared.b[i, k] * unit.d[k] * shared.a[k, j]
        torch.testing.assert_close(unit.weight(layer.weight) - layer.weight, want, rtol=1e-12, atol=1e-12)
        assert torch.linalg.matrix_rank(want) == 4
        x = torch.randn(3, in_, dtype=torch.double)
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(layer(x), x @ (layer.weight + want).T + bias, rtol=1e-12, atol=1e-12)


def test_it_trains_out_plus_r_values_a_site_and_stores_one_pair_of_the_largest_size() -> None:
    net = layers()
    adapter = dt.attach(net, dt.VeRA(r=4, targets=nn.Linear))
    assert sum(p.numel() for p in adapter.parameters()) == (10 + 4) + (7 + 4) + (10 + 4)
    assert {(u.projections.a.data_ptr(), u.projections.b.data_ptr()) for u in units(adapter)} == {
        (units(adapter)[0].projections.a.data_ptr(), units(adapter)[0].projections.b.data_ptr())
    }
    for unit, layer in zip(units(adapter), net, strict=True):
        b, a = unit.projected()
        assert (b.data_ptr(), a.data_ptr()) == (unit.projections.b.data_ptr(), unit.projections.a.data_ptr())
        assert b.shape == (layer.out_features, 4) and a.shape == (4, layer.in_features)
    assert units(adapter)[0].projections.a.shape == (4, 12) and units(adapter)[0].projections.b.shape == (10, 4)


def test_at_the_first_step_only_b_has_a_gradient_and_no_matrix_ever_does() -> None:
    net = layers()
    adapter = dt.attach(net, dt.VeRA(r=4, d_initial=0.3, targets=nn.Linear))
    net(torch.randn(5, 12, dtype=torch.double)).square().sum().backward()
    for unit in units(adapter):
        assert unit.b.grad.any() and not unit.d.grad.any()
        assert torch.equal(unit.d, torch.full_like(unit.d, 0.3)) and not unit.b.any()
        assert not unit.projections.a.requires_grad and not unit.projections.b.requires_grad


def test_products_with_the_vectors_are_not_formed_in_a_forward_pass() -> None:
    """Neither diag(b) B, out x r, nor diag(d) A, r x in, is among the results of its operations."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func in (Tensor.mul, torch.mul, Tensor.__mul__):
                seen.append(tuple(out.shape))
            return out

    net = nn.Sequential(nn.Linear(12, 10))
    dt.attach(net, dt.VeRA(r=4, targets=nn.Linear))
    with Watch():
        net(torch.randn(3, 12))
    assert seen == [(3, 4), (3, 10)]


def test_the_pair_is_kaiming_uniform_and_follows_from_the_seed_alone() -> None:
    def pair(seed: int, draws: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(draws)
        unit = units(dt.attach(nn.Sequential(nn.Linear(400, 300)), dt.VeRA(r=50, seed=seed, targets=nn.Linear)))[0]
        return unit.projections.a, unit.projections.b

    (a, b), (same_a, same_b), (other_a, other_b) = pair(3, 1), pair(3, 2), pair(4, 1)
    assert torch.equal(a, same_a) and torch.equal(b, same_b)
    assert not torch.equal(a, other_a) and not torch.equal(b, other_b)
    for t in (a, b):
        bound = math.sqrt(6 / t.shape[1])
        assert 0.999 * bound < t.abs().max() <= bound
        assert t.std() == pytest.approx(math.sqrt(2 / t.shape[1]), rel=0.02) and abs(t.mean()) < 0.02 * bound


@pytest.mark.parametrize("save", [False, True])
def test_a_file_holds_the_pair_only_when_asked(save: bool, tmp_path) -> None:
    net = tiny("llama")
    batch = inputs(net)
    adapter = dt.attach(net, dt.VeRA(r=4, save_projection=save))
    shake(adapter)
    if save:  # a pair from elsewhere
        with torch.no_grad():
            units(adapter)[0].projections.a.mul_(-2)
    want = net(**batch).logits
    adapter.save(tmp_path)
    stored = sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    trained = sum(p.numel() for p in adapter.parameters())
    assert stored == trained + (4 * (64 + 64) if save else 0)  # the largest site is 64 x 32, and 32 x 64
    dt.detach(net)
    torch.manual_seed(99)
    dt.load(net, tmp_path)
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-6, atol=1e-6)


def test_inside_dora() -> None:
    """DVoRA (sec. 4.5 of arXiv:2402.09353): the magnitude around VeRA's direction."""
    net = layers()
    adapter = dt.attach(net, dt.DoRA(inner=dt.VeRA(r=4), targets=nn.Linear))
    shake(adapter)
    for layer, (_, unit) in zip(net, adapter.units(), strict=True):
        moved = unit.inner.weight(layer.weight)
        want = unit.m[:, None] * moved / moved.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(unit.weight(layer.weight), want, rtol=1e-12, atol=1e-12)


def test_peft_gives_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    ours = tiny("llama")
    batch, targets = inputs(ours), ("q_proj", "up_proj", "down_proj")  # three shapes
    config = peft.VeraConfig(r=6, target_modules=list(targets), d_initial=0.2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    adapter = dt.attach(ours, dt.VeRA(r=6, d_initial=0.2, save_projection=True, targets=targets))
    shake(adapter)
    pairs = [(u, theirs.get_submodule(f"base_model.model.{path}")) for path, _, u, _ in adapter.sites()]
    with torch.no_grad():
        for name, shared in (("a", theirs.base_model.vera_A), ("b", theirs.base_model.vera_B)):
            getattr(pairs[0][0].projections, name).copy_(shared["default"])
        for unit, layer in pairs:
            assert torch.equal(layer.vera_lambda_d["default"], torch.full((6,), 0.2))
            layer.vera_lambda_b["default"].copy_(unit.b)
            layer.vera_lambda_d["default"].copy_(unit.d)
    got, want = ours(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for logits in (got, want):
        logits.square().mean().backward()
    for unit, layer in pairs:
        torch.testing.assert_close(unit.b.grad, layer.vera_lambda_b["default"].grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unit.d.grad, layer.vera_lambda_d["default"].grad, rtol=1e-4, atol=1e-5)


def test_seeded_numbers_are_the_published_generator() -> None:
    """SplitMix64 in Python's whole numbers."""
    state, mask, want = int.from_bytes(blake2b(b"key", digest_size=8).digest(), "big"), (1 << 64) - 1, []
    for _ in range(100):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        want.append(((z ^ (z >> 31)) >> 40) / 2**24)
    cpu = torch.device("cpu")
    assert uniform("key", 100, cpu).tolist() == want
    assert sorted(permutation("key", 1000, cpu).tolist()) == list(range(1000))
    n = normal("key", 100_000, cpu)
    assert abs(n.mean()) < 0.01 and n.std() == pytest.approx(1, abs=0.01) and (n**4).mean() == pytest.approx(3, abs=0.1)
    assert set(signs("key", 1000, cpu).tolist()) == {-1.0, 1.0} and abs(signs("key", 10_000, cpu).mean()) < 0.03


def test_options_are_checked() -> None:
    with pytest.raises(dt.DeltatuneError, match="r must be at least 1, got 0"):
        dt.VeRA(r=0)
    with pytest.raises(dt.DeltatuneError, match="dropout must lie in"):
        dt.VeRA(dropout=1.0)
