"""Ladders under padding, packing, caches, and rows that name their adapters."""

from __future__ import annotations

from typing import Any

import prefixed
import pytest
import torch
from ladders import SEQ2SEQ, build, near, perturb
from torch import Tensor

import deltatune as dt
from deltatune.methods.ladder import LadderSideTuning, ResidualLadder
from deltatune.models.tiny import PAD, inputs


def padded(family: str, side: str) -> Any:
    given, rows, starts = prefixed.padded(side, length=7)
    mask = given["attention_mask"]
    if side == "left" and family in ("llama", "gpt2"):
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given, rows, starts


@pytest.mark.parametrize("family,side", [(f, s) for s in ("left", "right") for f in
                                         ("llama", "gpt2", "bloom", "opt", "roberta", "t5")]
                         + [("bert", "right"), ("bart", "right")])  # fmt: skip
@torch.no_grad()
def test_padding_changes_no_real_token(family: str, side: str) -> None:
    model = build(family)
    perturb(dt.attach(model, LadderSideTuning(reduction=2)))
    batch, rows, starts = padded(family, side)
    extra = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family in SEQ2SEQ else {}
    got = model(**batch, **{k: v.expand(len(rows), -1) for k, v in extra.items()}).logits
    for i, row in enumerate(rows):
        want = model(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **extra).logits[0]
        near(got[i] if family in SEQ2SEQ else got[i, starts[i] : starts[i] + len(row)], want)


@pytest.mark.parametrize("family", ("llama", "gpt2", "mistral"))
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model = build(family)
    perturb(dt.attach(model, LadderSideTuning(reduction=2)))
    one, two = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    got = model(input_ids=torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    near(got[:, :4], model(input_ids=one).logits)
    near(got[:, 4:], model(input_ids=two).logits)


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None, **options)


@pytest.mark.parametrize(
    "family", ("llama", "mistral", "gemma2", "gpt2", "gptj", "opt", "bloom", "falcon", "t5", "bart")
)
@torch.no_grad()
def test_generation_is_the_same_with_and_without_a_cache(family: str) -> None:
    model = build(family)
    perturb(dt.attach(model, LadderSideTuning(reduction=2)), size=0.3)
    batch, rows, _ = padded(family, "right" if family == "bart" else "left")
    batch.pop("position_ids", None)
    want = generate(model, batch, use_cache=False)
    assert torch.equal(generate(model, batch), want)
    assert torch.equal(generate(model, batch, num_beams=2), generate(model, batch, num_beams=2, use_cache=False))
    if family not in SEQ2SEQ:
        assert torch.equal(generate(model, batch, prefill_chunk_size=3), want)
        cached = model(**batch, use_cache=True).past_key_values
        assert len(cached.layers) == 4  # two of the backbone, two of the ladder


# several adapters


PAIRS = [("ladder", "wider", f) for f in ("llama", "bert", "t5", "bart")] + [
    ("ladder", "lora", f) for f in ("llama", "gpt2", "bloom", "t5")
]
METHODS = {"ladder": LadderSideTuning(reduction=2), "wider": ResidualLadder(reduction=1), "lora": dt.LoRA(r=4)}


def two(one: str, other: str, family: str) -> Any:
    model = build(family)
    for seed, name in enumerate((one, other)):
        perturb(dt.attach(model, METHODS[name], name), seed, 0.1)
    return model


@pytest.mark.parametrize("one,other,family", PAIRS)
def test_rows_of_one_batch_name_their_adapters(one: str, other: str, family: str) -> None:
    model = two(one, other, family)
    batch = inputs(model, batch=5)
    names = [other, None, one, other, one]
    weight = torch.randn(model(**batch).logits.shape)
    separate, grads = {}, {}
    for name in (one, other, None):
        dt.activate(model, *([name] if name else []))
        separate[name] = model(**batch).logits
        if name:
            (separate[name] * weight)[torch.tensor([n == name for n in names])].sum().backward()
            grads[name] = [p.grad.clone() for p in dt.adapters(model)[name].parameters()]  # type: ignore[union-attr]
            model.zero_grad()
    dt.activate(model, router=dt.PerRow(names))
    mixed = model(**batch).logits
    for i, name in enumerate(names):
        near(mixed[i], separate[name][i])
    (mixed * weight).sum().backward()
    for name, want in grads.items():
        for p, g in zip(dt.adapters(model)[name].parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, g, atol=1e-4 * g.abs().max().item() + 1e-5, rtol=1e-3)


@pytest.mark.parametrize("first", ("ladder", "prompt"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bert"))
@torch.no_grad()
def test_rows_under_a_prompt_may_come_first_or_last(family: str, first: str) -> None:
    model = build(family)
    for name, method in (("ladder", METHODS["ladder"]), ("prompt", dt.PromptTuning(length=3))):
        perturb(dt.attach(model, method, name), size=0.1)
    batch = inputs(model, batch=3)
    names = [first, None, {"ladder": "prompt", "prompt": "ladder"}[first]]
    with dt.using(model, router=dt.PerRow(names)):
        mixed = model(**batch).logits
    for i, name in enumerate(names):
        with dt.using(model, *([name] if name else [])):
            want = model(**batch).logits[i]
        near(mixed[i, -len(want) :], want)


@pytest.mark.parametrize("family", ("llama", "bloom", "t5"))
@torch.no_grad()
def test_rows_generate_under_their_own_ladders(family: str) -> None:
    model = two("ladder", "wider", family)
    batch, *_ = padded(family, "left")
    batch.pop("position_ids", None)
    names = ["wider", "ladder", None]
    want = []
    for i, name in enumerate(names):
        with dt.using(model, *([name] if name else [])):
            want.append(generate(model, batch)[i])
    with dt.using(model, router=dt.PerRow(names)):
        assert torch.equal(generate(model, batch), torch.stack(want))
        both = [generate(model, batch, num_beams=2, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*both)


@pytest.mark.parametrize("family,names", [(f, ["unipelt", None, "ladder"]) for f in ("llama", "gpt2", "t5")]
                         + [("llama", ["wider", "unipelt", "ladder"])])  # fmt: skip
@torch.no_grad()
def test_rows_generate_beside_gates_that_have_layers_in_the_cache_too(family: str, names: list[Any]) -> None:
    model = two("ladder", "wider", family)
    perturb(dt.attach(model, dt.UniPELT(length=3, hidden=4, r=2, size=4), "unipelt"), 2, 0.1)
    batch, *_ = padded(family, "left")
    batch.pop("position_ids", None)
    want = []
    for i, name in enumerate(names):
        with dt.using(model, *([name] if name else [])):
            want.append(generate(model, batch)[i])
    with dt.using(model, router=dt.PerRow(names)):
        for options in ({}, {"use_cache": False}):
            assert torch.equal(generate(model, batch, **options), torch.stack(want))
        assert torch.equal(generate(model, batch, num_beams=2), generate(model, batch, num_beams=2, use_cache=False))


@pytest.mark.parametrize("names", (("unipelt", "ladder"), ("ladder", "unipelt"), ("wider", "unipelt", "ladder")))
@torch.no_grad()
def test_a_stack_of_ladders_and_gates_generates_with_a_cache(names: tuple[str, ...]) -> None:
    model = two("ladder", "wider", "llama")
    perturb(dt.attach(model, dt.UniPELT(length=3, hidden=4, r=2, size=4), "unipelt"), 2, 0.1)
    batch, *_ = padded("llama", "left")
    batch.pop("position_ids", None)
    with dt.using(model, *names):
        for options in ({}, {"num_beams": 2}, {"prefill_chunk_size": 3}):
            plain = {k: v for k, v in options.items() if k != "prefill_chunk_size"}
            assert torch.equal(generate(model, batch, **options), generate(model, batch, **plain, use_cache=False))


@pytest.mark.parametrize("other", (dt.PromptTuning(length=3), dt.PrefixTuning(length=3), dt.UniPELT()))
@pytest.mark.parametrize("family", ("llama", "gpt2", "t5", "bart"))
@torch.no_grad()
def test_rows_under_two_ladders_and_a_prompt_are_those_of_each_alone(family: str, other: dt.Method) -> None:
    """Neither ladder is inside the other, nor are the other's states its own."""
    model = build(family)
    methods = {"one": LadderSideTuning(reduction=4), "two": LadderSideTuning(reduction=2), "other": other}
    for name, method in methods.items():
        perturb(dt.attach(model, method, name))
    batch = inputs(model, batch=4)
    names = (*methods, None)
    want = []
    for i, name in enumerate(names):
        dt.activate(model, *([] if name is None else [name]))
        want.append(model(**{k: v[i : i + 1] for k, v in batch.items()}).logits[0])
    dt.activate(model, router=dt.PerRow(names))
    got = model(**batch, use_cache=False).logits
    for row, alone in zip(got, want, strict=True):
        near(row[-len(alone) :], alone)
