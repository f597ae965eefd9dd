"""Pfeiffer adapters: where they sit in each architecture, what they compute, and that the start is the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import Part, resolve
from deltatune.methods.pfeiffer import AtBlock, AtNorm, Bottleneck
from deltatune.models.tiny import inputs, tiny

POST = ("bert", "roberta", "deberta-v2", "distilbert", "bart")
PRE = ("llama", "gemma2", "gpt2", "gpt_neox", "gptj", "falcon", "phi", "bloom", "opt", "t5", "whisper", "vit")


def randomise(adapter: dt.Adapter, std: float = 0.3, seed: int = 1) -> dt.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return adapter


def f(unit: nn.Module, x: Tensor) -> Tensor:
    """The paper's f, in float64."""
    down, down_bias, up, up_bias = (getattr(unit, n).double() for n in ("down", "down_bias", "up", "up_bias"))
    return F.relu(x.double() @ down.T + down_bias) @ up.T + up_bias


@pytest.mark.parametrize("family", [*POST, *PRE])
@torch.no_grad()  # T5's attention takes another kernel where its bias has a gradient
def test_one_adapter_ends_each_block_and_the_start_is_the_base_bitwise(family: str) -> None:
    model = tiny(family)
    batch = inputs(model)
    want = model(**batch).logits
    adapter = dt.attach(model, dt.Pfeiffer(size=3))
    blocks = [m.path for m in resolve(model, Part("block"))]
    sites = [path for path, *_ in adapter.sites()]
    assert len(sites) == len(blocks) and all(
        p == b or p.startswith(f"{b}.") for p, b in zip(sites, blocks, strict=True)
    )
    assert {type(u) for _, u in adapter.units()} == {AtNorm if family in POST else AtBlock}
    assert sum(p.numel() for p in adapter.parameters()) == len(blocks) * (2 * 32 * 3 + 3 + 32)
    assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("method", [dt.Pfeiffer, dt.ParallelAdapter])
@pytest.mark.parametrize("name,function", [("silu", lambda x: x * x.sigmoid()), ("relu", lambda x: x.clamp(min=0))])
@torch.no_grad()
def test_the_function_between_the_projections(method: type[dt.core.Method], name: str, function: Any) -> None:
    """What one unit adds to the output of its module, in float64."""
    model = tiny("llama").double()
    target = r"model\.layers\.1\.mlp\.down_proj" if method is dt.ParallelAdapter else r"model\.layers\.1"
    with pytest.raises(dt.DeltatuneError, match="activation='tanh' is not one of .*silu"):
        method(activation="tanh")
    adapter = randomise(dt.attach(model, method(size=3, targets=target, activation=name)))
    unit = next(u for _, u in adapter.units() if list(u.parameters()))
    seen: list[Tensor] = []
    if method is dt.ParallelAdapter:
        *_, tap = (m for p, m, u, _ in adapter.sites() if p.startswith("model.layers.1.") and u is not unit)
        tap.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    before: list[Tensor] = []
    module = model.get_submodule(target.replace("\\", ""))
    module.register_forward_hook(lambda m, a, y: before.append(y))
    batch = inputs(model)
    model(**batch)
    dt.activate(model)
    model(**batch)
    changed, plain = before
    x = seen[0] if seen else plain
    want = function(x @ unit.down.T + unit.down_bias) @ unit.up.T + unit.up_bias
    torch.testing.assert_close(changed - plain, (4.0 if seen else 1.0) * want)


def test_has_half_the_parameters_of_houlsby() -> None:
    houlsby = dt.plan(tiny("bert"), dt.Houlsby(size=7, norms=None)).trained
    assert 2 * dt.plan(tiny("bert"), dt.Pfeiffer(size=7)).trained == houlsby


@pytest.mark.parametrize("family", POST)
def test_after_the_sum_the_norm_of_the_block_runs_twice(family: str) -> None:
    """From u, h1 and the norm as the block has them: h2 = LN(f(LN(u + h1)) + u + h1), at the block's end."""
    torch.manual_seed(0)
    model = tiny(family).double()
    adapter = randomise(dt.attach(model, dt.Pfeiffer(size=3)))
    path, norm, unit, _ = next(iter(adapter.sites()))
    block = next(m for m in resolve(model, Part("block")) if path.startswith(f"{m.path}."))
    down = next(m for m in resolve(model, Part("down")) if m.path.startswith(f"{block.path}."))
    seen: dict[str, Tensor] = {}
    down.module.register_forward_hook(lambda m, a, y: seen.update(u=y.detach()))
    norm.register_forward_pre_hook(lambda m, a: seen.update(total=a[0].detach()))
    block.module.register_forward_hook(lambda m, a, y: seen.update(h2=(y[0] if isinstance(y, tuple) else y).detach()))
    model(**inputs(model))
    h1 = seen["total"] - seen["u"]
    gain, bias, eps = norm.weight, norm.bias, getattr(norm, "eps", None) or norm.variance_epsilon

    def ln(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() * gain + bias

    want = ln(f(unit, ln(seen["u"] + h1)) + seen["u"] + h1)
    torch.testing.assert_close(seen["h2"], want, atol=1e-10, rtol=0)
    after = ln(seen["u"] + h1) + f(unit, ln(seen["u"] + h1))  # the residual after the norm is another function
    assert (seen["h2"] - after).abs().max() > 0.1


@pytest.mark.parametrize("family", PRE)
def test_before_the_sublayers_there_is_no_norm_around_the_adapter(family: str) -> None:
    """h2 = f(x) + x with x = u + h1 what the block of the base puts out."""
    torch.manual_seed(0)
    model = tiny(family).double()
    adapter = randomise(dt.attach(model, dt.Pfeiffer(size=3)))
    _, block, unit, _ = next(iter(adapter.sites()))
    seen: list[Tensor] = []
    block.register_forward_hook(lambda m, a, y: seen.append((y[0] if isinstance(y, tuple) else y).detach().clone()))
    given = inputs(model)
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    model(**given)
    dt.activate(model)
    model(**given)
    torch.testing.assert_close(seen[0], seen[1] + f(unit, seen[1]), atol=1e-10, rtol=0)
    assert (seen[0] - seen[1]).abs().max() > 0.01


def test_opt_is_of_either_kind() -> None:
    before, after = (
        dt.plan(tiny("opt", do_layer_norm_before=first), dt.Pfeiffer(size=2)).sites for first in (True, False)
    )
    assert {s.path.rpartition(".")[2] for s in before} == {"0", "1"}
    assert {s.path.rpartition(".")[2] for s in after} == {"final_layer_norm"}


def test_nothing_but_the_adapters_trains() -> None:
    model = tiny("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = dt.attach(model, dt.Pfeiffer(size=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**inputs(model), labels=inputs(model)["input_ids"]).loss.backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_near_identity_start_and_choices_are_checked() -> None:
    model = tiny("llama")
    given = inputs(model)
    want = model(**given).logits
    adapter = dt.attach(model, dt.Pfeiffer(size=48, init=dt.NearIdentity(std=0.02)))
    for _, unit in adapter.units():
        assert isinstance(unit, Bottleneck) and all(0.015 < p.std() < 0.02 for p in (unit.down, unit.up))
    assert 0 < (model(**given).logits - want).abs().max() < 0.2
    with pytest.raises(dt.DeltatuneError, match="size must be at least 1, got 0"):
        dt.Pfeiffer(size=0)


def test_projections_start_as_documented() -> None:
    torch.manual_seed(0)
    for _, unit in dt.attach(tiny("bert"), dt.Pfeiffer(size=256)).units():
        assert isinstance(unit, Bottleneck) and abs(float(unit.down.detach().std()) - 0.02) < 1e-3
        assert not any(p.any() for p in (unit.up, unit.down_bias, unit.up_bias))


def test_the_towers_of_a_model_have_adapters_of_their_own_widths() -> None:
    model = tiny("clip", vision_config={**tiny("clip").config.vision_config.to_dict(), "hidden_size": 48})
    widths = {path: len(unit.up) for path, _, unit, _ in dt.attach(model, dt.Pfeiffer(size=3)).sites()}
    assert widths and all(w == (48 if path.startswith("vision") else 32) for path, w in widths.items())
    assert set(widths.values()) == {32, 48}
    model(**inputs(model))


def test_a_plain_model_names_its_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(3, 4)
    with pytest.raises(dt.DeltatuneError, match="no config"):
        dt.attach(model, dt.Pfeiffer(size=2))
    with pytest.raises(dt.DeltatuneError, match="does not say its width; target a norm"):
        dt.attach(nn.Sequential(nn.Sequential(nn.ReLU())), dt.Pfeiffer(size=2, targets="0.0"))
    unit = randomise(dt.attach(model, dt.Pfeiffer(size=2, targets="1")))
    (bottleneck,) = (u for _, u in unit.units())
    total = model[0](x)
    ln = lambda t: F.layer_norm(t, (4,), model[1].weight, model[1].bias)
    want = ln(total + f(bottleneck, ln(total)).float())
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("family", ["llama", "bloom", "bert", "t5"])
def test_rows_of_a_batch_name_their_adapters(family: str) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    given = inputs(model, batch=3)
    alone = []
    for i, name in enumerate(("one", "two")):
        randomise(dt.attach(model, dt.Pfeiffer(size=2 + i), name), seed=i)
        alone.append(model(**given).logits)
    dt.activate(model)
    alone.append(model(**given).logits)
    dt.activate(model, router=dt.PerRow(["two", None, "one"]))
    mixed = model(**given).logits
    torch.testing.assert_close(mixed, torch.stack([alone[1][0], alone[2][1], alone[0][2]]), atol=1e-5, rtol=1e-4)


def ids(model: nn.Module, router: bool = False, **kwargs: object) -> list[list[int]]:
    given = {k: v for k, v in inputs(model, batch=2).items() if not k.startswith("decoder")}
    if given["input_ids"].shape[1] > 6:
        given = {k: v[:, :6] for k, v in given.items()}
    return model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=98, **kwargs).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "t5", "bart"])
def test_generation_with_and_without_a_cache(family: str) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    base = ids(model)
    randomise(dt.attach(model, dt.Pfeiffer(size=4), "one"), 0.5)
    one = ids(model)
    assert one == ids(model, use_cache=False) and one != base
    dt.activate(model, router=dt.PerRow([None, "one"]))  # a block writes to one cache for both rows
    assert ids(model) == [base[0], one[1]]
