"""Prefixes under padding, caches, packing, checkpointing, heads, and rows of their own."""

from __future__ import annotations

import pytest
import torch
from prefixed import CAUSAL, ENCODERS, GENERATE, SEQ2SEQ, build, generate, near, out, padded

import deltatune as dt
from deltatune.methods.prefix import PrefixTuning
from deltatune.methods.prompt import PromptTuning
from deltatune.models.tiny import inputs


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "bert", "t5"))
@torch.no_grad()
def test_a_masked_prefix_is_the_base_but_a_prefix_of_zeros_is_not(family):
    model = build(family)
    given = inputs(model)
    alone = out(model, given)
    adapter = dt.attach(model, PrefixTuning(length=3), "p")
    with dt.using(model, router=dt.PerRow(["p", None])):
        mixed = out(model, given)
    near(mixed[1], alone[1])
    near(mixed[0], out(model, given)[0])
    for p in adapter.parameters():
        p.zero_()
    assert (out(model, given) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", (*CAUSAL, *ENCODERS, "t5", "mt5"))
@torch.no_grad()
def test_rows_and_padding(family, side, implementation):
    """Rows under prefixes of different lengths, or none, padded on either side, equal each row alone."""
    if implementation == "sdpa" and family in ("gemma2", "gptj", "bloom", "falcon-alibi-eager"):
        implementation = "eager"  # they have no other
    if family == "falcon-alibi-eager" or (family == "falcon-alibi" and implementation == "eager"):
        family, implementation = "falcon-alibi-eager", "eager"
    model = build(family)
    model.set_attn_implementation(implementation)
    dt.attach(model, PrefixTuning(length=2), "short")
    dt.attach(model, PrefixTuning(length=5, hidden=4), "long")
    batch, rows, starts = padded(side)
    names = ["short", None, "long"]
    extra = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family in SEQ2SEQ else {}
    whole = {k: v.expand(3, -1) for k, v in extra.items()}

    def compare(got, names):
        for i, (row, name) in enumerate(zip(rows, names, strict=True)):
            with dt.using(model, *([name] if name else [])):
                want = out(model, {"input_ids": row[None], "attention_mask": torch.ones(1, len(row)), **extra})[0]
            near(got[i] if extra else got[i, starts[i] : starts[i] + len(row)], want)

    with dt.using(model, router=dt.PerRow(names)):
        compare(out(model, {**batch, **whole}), names)
    with dt.using(model, "short"):
        compare(out(model, {**batch, **whole}), ["short"] * 3)


@pytest.mark.parametrize("family", GENERATE)
@torch.no_grad()
def test_generation_with_and_without_cache_and_row_by_row(family):
    model = build(family, **({"sliding_window": 4} if family in ("mistral", "gemma2") else {}))
    batch, rows, _ = padded("left" if family != "bart" else "right")
    base = generate(model, batch)
    dt.attach(model, PrefixTuning(length=2), "short")
    dt.attach(model, PrefixTuning(length=5), "long")
    names, n = ["short", None, "long"], 0 if family in SEQ2SEQ else batch["input_ids"].shape[1]
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}):
        if "cache_implementation" in options and family in (*SEQ2SEQ, "falcon-alibi"):
            continue  # transformers itself has no static cache for ALiBi in Falcon
        with dt.using(model, router=dt.PerRow(names)):
            got = generate(model, batch, **options)[:, n:]
        for i, (row, name) in enumerate(zip(rows, names, strict=True)):
            one = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            with dt.using(model, *([name] if name else [])):
                beams = {k: v for k, v in options.items() if k == "num_beams"}
                assert torch.equal(got[i], generate(model, one, **beams)[0, len(row) if n else 0 :]), (name, options)
    dt.detach(model)
    assert torch.equal(generate(model, batch), base)


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "opt", "t5"))
@torch.no_grad()
def test_prompts_and_prefixes_share_a_model_and_a_batch(family):
    model = build(family)
    dt.attach(model, dt.Union(methods=(PrefixTuning(length=2), PromptTuning(length=3))), "both")
    batch, rows, _ = padded("left")
    assert torch.equal(generate(model, batch), generate(model, batch, use_cache=False))
    dt.attach(model, PrefixTuning(length=3), "prefix")
    dt.attach(model, PromptTuning(length=4), "prompt")
    names, n = ["prompt", None, "prefix"], 0 if family in SEQ2SEQ else 6
    for options in ({}, {"use_cache": False}):
        with dt.using(model, router=dt.PerRow(names)):
            got = generate(model, batch, **options)[:, n:]
        for i, (row, name) in enumerate(zip(rows, names, strict=True)):
            one = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            with dt.using(model, *([name] if name else [])):
                assert torch.equal(got[i], generate(model, one)[0, len(row) if n else 0 :]), (name, options)


@pytest.mark.parametrize("family", ("llama", "gpt2", "phi"))
@torch.no_grad()
def test_packed_documents_each_see_the_prefix(family):
    model = build(family)
    ids = inputs(model, batch=1, length=8)["input_ids"]
    dt.attach(model, PrefixTuning(length=3))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    got = model(input_ids=ids, position_ids=packed, use_cache=False).logits
    near(got[:, :3], model(input_ids=ids[:, :3]).logits)
    near(got[:, 3:], model(input_ids=ids[:, 3:]).logits)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "falcon", "bert", "t5"))
def test_activation_checkpointing_keeps_the_gradient(family, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = build(family).train()
        adapter = dt.attach(model, PrefixTuning(length=3, hidden=4))
        torch.manual_seed(2)
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.3)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:  # a checkpoint of this kind passes gradients only to what its inputs depend on
                model.enable_input_require_grads()
        out(model, inputs(model)).square().mean().backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
    assert all(g.abs().max() > 0 for g in grads[0])
    near(*grads)


@pytest.mark.parametrize("family", ("llama", "bert", "bart", "bloom"))
def test_classification_heads(family):
    model = build(family, "classification")
    given = inputs(model)
    alone = out(model, given)
    dt.attach(model, PrefixTuning(length=3))
    assert out(model, given).shape == (2, 3) and (out(model, given) - alone).abs().max() > 1e-3
