"""LoRA Dropout: which entries are dropped, how often, the mean of many draws, the ensemble, and PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deltatune as dt
from deltatune.models.tiny import inputs, tiny


def linear(**options: object) -> tuple[nn.Sequential, dt.Adapter, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20)).double().train()
    adapter = dt.attach(net, dt.LoRADropout(**{"r": 3, "alpha": 6.0, "targets": "0"} | options))
    shake(adapter)
    return net, adapter, next(u for _, u in adapter.units())


def shake(adapter: dt.Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)


def difference(net: nn.Sequential) -> Tensor:
    """dW of one forward pass, read off the rows of an identity."""
    eye = torch.eye(net[0].in_features, dtype=torch.double)
    return (net(eye) - net[0].bias).T - net[0].weight


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_whole_rows_and_columns_are_dropped_and_the_rest_is_unscaled(p: float) -> None:
    net, _, unit = linear(p=p)
    whole = 2.0 * unit.b @ unit.a
    zeros, rows, columns = 0.0, 0.0, 0.0
    for _ in range(200):
        got = difference(net)
        kept_rows, kept_columns = (got.abs() > 1e-9).any(1), (got.abs() > 1e-9).any(0)
        want = whole * kept_rows[:, None] * kept_columns
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        if min(kept_rows.sum(), kept_columns.sum()) > 3:
            assert torch.linalg.matrix_rank(got) == 3  # the rank is never dropped
        zeros += float((got.abs() < 1e-9).double().mean()) / 200
        rows += float((~kept_rows).double().mean()) / 200
        columns += float((~kept_columns).double().mean()) / 200
    assert rows == pytest.approx(p, abs=0.03) and columns == pytest.approx(p, abs=0.03)
    assert zeros == pytest.approx(2 * p - p**2, abs=0.03)


def test_the_mean_over_draws_is_what_evaluation_computes() -> None:
    net, _, unit = linear(p=0.4)
    total = sum(difference(net) for _ in range(4000)) / 4000
    want = 0.6**2 * 2.0 * unit.b @ unit.a
    assert (total - want).norm() < 0.05 * want.norm()
    torch.testing.assert_close(difference(net.eval()), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(unit.weight(net[0].weight) - net[0].weight, want, rtol=1e-10, atol=1e-12)


def test_merging_in_training_mode_writes_no_draw() -> None:
    net, _, unit = linear()
    want = net[0].weight + 0.25 * 2.0 * unit.b @ unit.a
    dt.merge(net.train())
    torch.testing.assert_close(net[0].weight, want, rtol=1e-10, atol=1e-12)


def test_without_dropping_it_is_lora() -> None:
    net, _, unit = linear(p=0.0)
    x = torch.randn(4, 30, dtype=torch.double)
    want = F.linear(x, net[0].weight + 2.0 * unit.b @ unit.a, net[0].bias)
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), want, rtol=1e-11, atol=1e-11)


def test_all_tokens_of_a_pass_have_one_mask_and_passes_have_their_own() -> None:
    net, _, _ = linear()
    x = torch.randn(1, 30, dtype=torch.double).expand(50, 30)
    y = net(x)
    torch.testing.assert_close(y, y[:1].expand_as(y))
    assert not torch.allclose(net(x), y)


def test_masks_on_the_weights_are_masks_on_the_activations() -> None:
    """s m_B * (((x * m_A) A') B'), with the masks of a model of the ensemble."""
    net, adapter, unit = linear()
    x = torch.randn(4, 30, dtype=torch.double)
    for _ in dt.LoRADropout.instances(adapter, 2):
        m_a, m_b = unit.mask("A", unit.a[:1])[0], unit.mask("B", unit.b[:, :1])[:, 0]
        assert set(m_a.tolist()) == set(m_b.tolist()) == {0.0, 1.0}
        want = F.linear(x, net[0].weight, net[0].bias) + 2.0 * m_b * ((x * m_a) @ unit.a.T @ unit.b.T)
        torch.testing.assert_close(net.eval()(x), want, rtol=1e-11, atol=1e-11)


def test_an_ensemble_is_the_same_models_each_time_and_ends_with_the_loop() -> None:
    model = tiny("gpt2").eval()
    adapter = dt.attach(model, dt.LoRADropout(r=4))
    shake(adapter)
    batch = inputs(model)
    alone = model(**batch).logits
    rounds = [[model(**batch).logits for _ in dt.LoRADropout.instances(adapter, 3)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*rounds, strict=True))
    assert all(not torch.allclose(a, b) for i, a in enumerate(rounds[0]) for b in rounds[0][:i])
    for _ in dt.LoRADropout.instances(adapter, 3):
        break
    assert torch.equal(model(**batch).logits, alone)
    places = {u.key for _, unit in adapter.units() for u in unit.modules() if hasattr(u, "keep_rate")}
    assert len(places) == len(list(adapter.sites()))  # pieces of a fused projection too


def test_the_average_of_many_instances_approaches_the_merged_model_of_a_linear_layer() -> None:
    net, adapter, _ = linear()
    x = torch.randn(4, 30, dtype=torch.double)
    mean = sum(net(x) for _ in dt.LoRADropout.instances(adapter, 1000)) / 1000
    base = F.linear(x, net[0].weight, net[0].bias)
    want = net.eval()(x)
    assert (mean - want).norm() < 0.1 * (want - base).norm()


def test_recomputing_activations_repeats_the_masks() -> None:
    model = tiny("llama").train()
    adapter = dt.attach(model, dt.LoRADropout(r=4))
    shake(adapter)
    block, x = model.model.layers[0].mlp, torch.randn(2, 5, 32)
    grads = []
    for run in (lambda h: block(h), lambda h: checkpoint(block, h, use_reentrant=False)):
        torch.manual_seed(7)
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(grads[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_peft_computes_the_same_in_evaluation() -> None:
    torch.manual_seed(0)
    ours = tiny("llama")
    batch, targets = inputs(ours), ("q_proj", "down_proj")
    config = peft.LoraConfig(r=4, lora_alpha=8 * 0.7**2, target_modules=list(targets), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    adapter = dt.attach(ours, dt.LoRADropout(r=4, alpha=8, p=0.3, targets=targets))
    shake(adapter)
    with torch.no_grad():
        for path, _, unit, _ in adapter.sites():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(unit.a)
            layer.lora_B["default"].weight.copy_(unit.b)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


def test_options_are_checked() -> None:
    with pytest.raises(dt.DeltatuneError, match=r"p must lie in \[0, 1\), got 1"):
        dt.LoRADropout(p=1)
    net = nn.Linear(3, 3)
    adapter = dt.attach(net, dt.LoRA(targets=nn.Linear), "plain")
    with pytest.raises(dt.DeltatuneError, match="'plain' has no masks: LoRA"):
        next(dt.LoRADropout.instances(adapter))
