"""Multitask prompt tuning (arXiv:2303.02861): factorised prompts, rows that name their tasks, and the two stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tasked import DECODERS, FAMILIES, TASKS, build, factors, near, sources

import deltatune as dt
from deltatune.models.tiny import PAD, inputs, tiny


@pytest.mark.parametrize("r", (1, 3))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_factors_of_ones_are_prompt_tuning(family: str, r: int) -> None:
    model = build(family)
    given = inputs(model)
    method = {"length": 3, "init": (11, 42, 7)}
    adapter = dt.attach(model, dt.MultitaskPrompt(**method, r=r), "mpt")
    got = model(**given).logits
    dt.attach(model, dt.PromptTuning(**method), "plain")
    near(got, model(**given).logits, 1e-6)
    dt.activate(model, "mpt")
    factors(adapter).v[..., :16].mul_(1.5)  # not all alike, which Bloom's norm of the embeddings would take back
    assert not torch.allclose(model(**given).logits, got, atol=1e-4)


def test_the_prompt_is_the_papers_and_its_ratio_has_rank_r() -> None:
    model = build()
    adapter = sources(model, r=2)
    own = factors(adapter)
    for t, task in enumerate(TASKS):
        shared, u, v = (x.detach().double() for x in (own.shared, own.u[t], own.v[t]))
        want = torch.stack([torch.stack([shared[i, j] * sum(u[i, k] * v[k, j] for k in range(2))
                                         for j in range(32)]) for i in range(4)])  # fmt: skip
        (unit,) = (u for _, u in adapter.units())
        got = unit.of(task).vectors().double()
        near(got, want)
        assert torch.linalg.matrix_rank(got / shared, tol=1e-4) == 2


def test_the_numbers_of_parameters() -> None:
    model = build()
    for r, tasks in ((1, ()), (3, TASKS)):
        n = dt.plan(model, dt.MultitaskPrompt(length=5, r=r, tasks=tasks)).trained
        assert n == 5 * 32 + max(1, len(tasks)) * r * (5 + 32)
    with torch.device("meta"):
        t5_base = tiny("t5", d_model=768, d_kv=64, d_ff=2048, num_heads=12)
    assert dt.plan(t5_base, dt.MultitaskPrompt(length=100)).trained == 77_668


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_of_several_tasks_is_each_task_alone(family: str) -> None:
    """Rows also name another adapter, or none, and are padded."""
    model = build(family)
    sources(model)
    dt.attach(model, dt.PromptTuning(length=6), "plain")
    names = ["sources.mnli", "plain", "sources.squad", None, "sources.mnli", "sources.sst2"]
    given = inputs(model, batch=6)
    given["input_ids"][1, 6:], given["attention_mask"][1, 6:] = PAD, 0
    with dt.using(model, router=dt.PerRow(names)):
        got = model(**given).logits
    seen = []
    for i, name in enumerate(names):
        one = {k: v[i : i + 1] for k, v in given.items()}
        with dt.using(model, router=dt.PerRow([name])):
            seen.append(model(**one).logits[0])
        n = 9 if i != 1 or family in ("t5", "bart") else 6
        near(got[i, :n], seen[-1][:n])
    one = {k: v[:1] for k, v in given.items()}
    with dt.using(model, router=dt.PerRow(["sources.squad"])):
        assert not torch.allclose(model(**one).logits[0], seen[0], atol=1e-3)


@pytest.mark.parametrize("family", (*DECODERS, "t5", "bart"))
@torch.no_grad()
def test_tasks_generate_as_alone_with_and_without_a_cache(family: str) -> None:
    model = build(family)
    sources(model)
    ids = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if family in DECODERS:
        ids[1, :3], mask[1, :3] = PAD, 0
    names = ["sources.sst2", "sources.squad", "sources.mnli"]
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    got = []
    for more in ({}, {"use_cache": False}, {"num_beams": 2}):
        with dt.using(model, router=dt.PerRow(names)):
            got.append(model.generate(input_ids=ids, attention_mask=mask, **how, **more))
    assert torch.equal(got[0], got[1])
    for i, name in enumerate(names):
        pad = 3 if mask[i, 0] == 0 else 0
        with dt.using(model, router=dt.PerRow([name])):
            alone = model.generate(input_ids=ids[i : i + 1, pad:], attention_mask=mask[i : i + 1, pad:], **how)
            beams = model.generate(input_ids=ids[i : i + 1, pad:], attention_mask=mask[i : i + 1, pad:], **how,
                                   num_beams=2)  # fmt: skip
        assert torch.equal(got[0][i, pad:], alone[0]) and torch.equal(got[2][i, pad:], beams[0])


def test_rows_train_their_own_factors_alone() -> None:
    model = build()
    own = factors(sources(model))
    given = inputs(model, batch=2)
    with dt.using(model, router=dt.PerRow(["sources.squad", "sources.sst2"])):
        model(**given).logits.square().mean().backward()
    for grad in (own.u.grad, own.v.grad):
        assert grad is not None and grad[0].any() and grad[2].any() and not grad[1].any()
    assert own.shared.grad is not None and own.shared.grad.any()


def test_tasks_that_are_missing_or_unknown_are_named() -> None:
    model = build()
    sources(model)
    dt.attach(model, dt.LoRA(), "law")
    given = inputs(model)
    with pytest.raises(dt.DeltatuneError, match="has several tasks; name one, as 'sources.squad'"):
        dt.activate(model, router=dt.PerRow(["sources", "law"]))
    with pytest.raises(dt.DeltatuneError, match="adapter 'sources' has no task 'squat'.*'squad'"):
        dt.activate(model, router=dt.PerRow(["sources.squat"]))
    with pytest.raises(dt.DeltatuneError, match="adapter 'law' has no task 'squad'"):
        dt.activate(model, router=dt.PerRow(["law.squad"]))
    dt.activate(model, "sources")
    with pytest.raises(dt.DeltatuneError, match="needs rows that name theirs"):
        model(**given)
    with pytest.raises(dt.DeltatuneError, match="3 tasks have no one prompt"):
        dt.flatten(dt.adapters(model)["sources"])
    for wrong in ({"r": 0}, {"tasks": ("a", "a")}, {"length": 0}):
        with pytest.raises(dt.DeltatuneError, match=r"^MultitaskPrompt: "):
            dt.MultitaskPrompt(**wrong)


@pytest.mark.parametrize("family", ("llama", "t5"))
@torch.no_grad()
def test_saved_tasks_are_those_that_were_trained(family: str, tmp_path: Any) -> None:
    model, other = build(family), build(family)
    sources(model, r=2).save(tmp_path)
    dt.load(other, tmp_path)
    names = dt.PerRow(["sources.sst2", "sources.mnli"])
    given = inputs(model)
    with dt.using(model, router=names):
        want = model(**given).logits
    with dt.using(other, router=names):
        assert torch.equal(other(**given).logits, want)


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom"))
@torch.no_grad()
def test_parity_with_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = build(family), build(family)
    adapter = sources(ours, r=2)
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2)
    theirs = peft.get_peft_model(theirs, config)
    encoder, own = theirs.prompt_encoder["default"], factors(adapter)
    encoder.embedding.weight.copy_(own.shared)
    encoder.prefix_task_cols.copy_(own.u)
    encoder.prefix_task_rows.copy_(own.v)
    given = inputs(ours, batch=3)
    with dt.using(ours, router=dt.PerRow(["sources.sst2", "sources.squad", "sources.mnli"])):
        got = ours(**given).logits
    near(got, theirs(**given, task_ids=torch.tensor([2, 0, 1])).logits[:, 4:])
