"""Rows of one batch under adapters of different kinds around one module: the cache that they share is written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from prefixed import build, generate, padded
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import Intervention, Method, Site
from deltatune.core.units import Base
from deltatune.models.tiny import inputs

PFEIFFER = dt.Pfeiffer(size=4)
METHODS: dict[str, Method] = {
    "pfeiffer": PFEIFFER,
    "dropped": dt.AdapterDrop(inner=PFEIFFER),
    "two": dt.Union(methods=(PFEIFFER, dt.Pfeiffer(size=3))),
    "fused": dt.AdapterFusion(adapters=("a", "b"), methods=2 * (dt.Pfeiffer(size=4, init=dt.NearIdentity(std=0.3)),)),
    "prefix": dt.PrefixTuning(length=3),
    "prompt": dt.PromptTuning(length=3),
    "both": dt.Union(methods=(dt.PrefixTuning(length=2), dt.PromptTuning(length=2))),
    "prompts": dt.Union(methods=(dt.PromptTuning(length=2), dt.PromptTuning(length=3))),
    "ladder": dt.LadderSideTuning(reduction=2),
    "unipelt": dt.UniPELT(length=3, hidden=6, r=2, size=4),
    "lora": dt.LoRA(r=2),
}
BATCHES: tuple[tuple[str | None, ...], ...] = (
    ("prefix", "pfeiffer", None),  # at different modules
    ("pfeiffer", "dropped", None),  # at one block
    ("dropped", "fused", "lora"),
    ("two", "pfeiffer", None),
    ("pfeiffer", "ladder", None),
    ("ladder", "dropped", "pfeiffer"),
    ("both", None, "prefix"),  # at one backbone
    ("prompts", "prompt", "pfeiffer"),
    ("prefix", "ladder", None),
)


def adapted(family: str, names: Sequence[str | None]) -> Any:
    model = build(family)
    for seed, name in enumerate(n for n in dict.fromkeys(names) if n):
        adapter = dt.attach(model, METHODS[name], name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def told(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens (rows, n) and the logits (rows, new, vocabulary) that they were chosen by."""
    out = generate(model, batch, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, 1)


def alone(model: Any, batch: dict[str, Tensor], names: Sequence[str | None]) -> dict[str | None, Any]:
    found = {}
    for name in names:
        with dt.using(model, *([name] if name else [])):
            found[name] = told(model, batch)
    return found


def check(got: tuple[Tensor, Tensor], want: dict[str | None, Any], names: Sequence[str | None]) -> None:
    for i, name in enumerate(names):
        assert torch.equal(got[0][i], want[name][0][i]), name
        torch.testing.assert_close(got[1][i], want[name][1][i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("names", BATCHES, ids=lambda names: ", ".join(map(str, names)))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "opt", "t5", "bart"))
@torch.no_grad()
def test_rows_generate_as_each_does_alone(family: str, names: tuple[str | None, ...]) -> None:
    model = adapted(family, names)
    batch, _, _ = padded("right" if family == "bart" else "left")
    want = alone(model, batch, names)
    firsts = [logits[0, 0] for _, logits in want.values()]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(firsts) for b in firsts[:i])
    with dt.using(model, router=dt.PerRow(names)):
        for options in ({}, {"use_cache": False}):
            check(told(model, batch, **options), want, names)
        beams = [generate(model, batch, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@torch.no_grad()
def test_unipelt_beside_pfeiffer_and_a_prefix(family: str) -> None:
    names = ("unipelt", "pfeiffer", "prefix")
    model = adapted(family, names)
    batch, _, _ = padded("left")
    want = alone(model, batch, names)
    with dt.using(model, router=dt.PerRow(names)):
        check(told(model, batch), want, names)


@pytest.mark.parametrize("family", ("llama", "bloom", "bert", "t5"))
def test_logits_and_gradients_are_those_of_separate_runs(family: str) -> None:
    names = ["dropped", "two", None, "pfeiffer", "dropped"]
    model = adapted(family, names)
    given = inputs(model, batch=5)
    weight = torch.randn(model(**given).logits.shape)
    rows, grads = {}, {}
    for name in dict.fromkeys(names):
        dt.activate(model, *([name] if name else []))
        rows[name] = model(**given).logits
        if name:
            (rows[name] * weight)[torch.tensor([n == name for n in names])].sum().backward()
            grads[name] = [p.grad.clone() for p in dt.adapters(model)[name].parameters()]  # type: ignore[union-attr]
            model.zero_grad()
    dt.activate(model, router=dt.PerRow(names))
    mixed = model(**given).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], rows[name][i], atol=1e-5, rtol=1e-4)
    (mixed * weight).sum().backward()
    for name, want in grads.items():
        for p, g in zip(dt.adapters(model)[name].parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g, atol=1e-4 * g.abs().max().item() + 1e-5, rtol=1e-3)


class Twice(Intervention):
    """A unit that says nothing of batches."""

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


@dataclass(frozen=True, kw_only=True)
class Doubling(Method):
    usual = ("block",)
    at: ClassVar[tuple[str, ...]] = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        return Twice()


@pytest.mark.parametrize("names", [("twice", None, None), ("twice", "pfeiffer", None)], ids=str)
@torch.no_grad()
def test_rows_that_must_be_run_apart_share_no_cache(names: tuple[str | None, ...]) -> None:
    model = build("llama")
    dt.attach(model, Doubling(), "twice")
    dt.attach(model, PFEIFFER, "pfeiffer")
    batch, _, _ = padded("left")
    want = alone(model, batch, names)
    with dt.using(model, router=dt.PerRow(names)):
        with pytest.raises(dt.DeltatuneError, match=r"Twice at a LlamaDecoderLayer.*share.*cache.*use_cache=False"):
            generate(model, batch)
        check(told(model, batch, use_cache=False), want, names)
    with dt.using(model, router=dt.PerRow(["twice"] * 3)):  # all alike, so there is nothing to take apart
        check(told(model, batch), want, ["twice"] * 3)


@torch.no_grad()
def test_a_model_that_is_run_apart_returns_no_cache_of_some_rows() -> None:
    model = build("llama")
    given = inputs(model, batch=4)
    dt.attach(model, Doubling(targets=lambda path, module: path == "model.norm"), "twice")
    dt.attach(model, Whole(targets=lambda path, module: not path), "whole")
    names: list[str | None] = ["whole", "twice", None, "whole"]
    with dt.using(model, router=dt.PerRow(names)):
        mixed = model(**given)
    assert mixed.past_key_values is None
    for i, name in enumerate(names):
        with dt.using(model, *([name] if name else [])):
            torch.testing.assert_close(mixed.logits[i], model(**given).logits[i], atol=1e-5, rtol=1e-4)


PARALLEL = dt.ParallelAdapter(size=3, input=dt.Part("mlp"))


@pytest.mark.parametrize(("one", "other"), [(Doubling(), dt.LoRA(r=2)), (PARALLEL, dt.LoRA(r=2)), (PARALLEL, PARALLEL)],
                         ids=["block, linear", "mlp, linear", "mlp, mlp"])  # fmt: skip
@pytest.mark.parametrize("family", ("llama", "gpt2"))
@torch.no_grad()
def test_what_is_inside_of_a_module_that_is_run_apart(family: str, one: Method, other: Method) -> None:
    model = build(family)
    given, names = inputs(model, batch=4), ["other", None, "one", "other"]
    for seed, (name, method) in enumerate((("one", one), ("other", other))):
        generator = torch.Generator().manual_seed(seed)
        for p in dt.attach(model, method, name).parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    with dt.using(model, router=dt.PerRow(names)):
        mixed = model(**given, use_cache=False).logits
        twice = model(**{k: v.repeat_interleave(2, 0) for k, v in given.items()}, use_cache=False).logits
    for i, name in enumerate(names):
        with dt.using(model, *([name] if name else [])):
            want = model(**given, use_cache=False).logits[i]
        for got in (mixed[i], twice[2 * i], twice[2 * i + 1]):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


class Halved(Intervention):
    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        out.logits = out.logits / 2
        return out


@dataclass(frozen=True, kw_only=True)
class Whole(Method):
    at: ClassVar[tuple[str, ...]] = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        return Halved()
