"""Multitask prompt tuning (arXiv:2303.02861): factorised prompts, rows that name their tasks, and the two stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs_of import documents
from tiny_tokenizer import tiny_tokenizer

import deltatune as dt
from deltatune.callbacks.transfer import transfer
from deltatune.core import Run
from deltatune.data import Batches, Example
from deltatune.methods.multitask_prompt import Scaled
from deltatune.models.tiny import PAD, inputs, tiny
from deltatune.train import train
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions

FAMILIES = ("llama", "gpt2", "bloom", "opt", "bert", "roberta", "t5", "bart")
DECODERS = ("llama", "gpt2", "bloom", "opt")
TASKS = ("squad", "mnli", "sst2")


def build(family: str = "llama", task: str = "lm") -> Any:
    torch.manual_seed(0)
    return tiny(family, task)


def factors(adapter: dt.Adapter) -> Scaled:
    return next(m for _, u in adapter.units() for m in u.modules() if isinstance(m, Scaled))


def sources(model: Any, r: int = 1, seed: int = 1) -> dt.Adapter:
    """An adapter of three tasks with factors of their own."""
    adapter = dt.attach(model, dt.MultitaskPrompt(length=4, r=r, tasks=TASKS), "sources")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g).to(p.dtype))
    return adapter


def near(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


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


# The first stage


def mixed(n: int = 12) -> list[Example]:
    return [replace(e, adapter=f"sources.{TASKS[i % 3]}") for i, e in enumerate(documents(n))]


OPTIONS = {"lr": 1e-2, "batch_size": 6, "schedule": "constant", "precision": "fp32"}


def stage_one(weight: float, steps: int = 8, mode: str = "llama") -> tuple[Any, dt.Adapter, Any, list[float]]:
    model = build(mode)
    for i, task in enumerate(TASKS):  # teachers, as different as prompts are
        torch.manual_seed(i)
        dt.attach(model, dt.PromptTuning(length=4), task)
    torch.manual_seed(7)
    adapter = dt.attach(model, dt.MultitaskPrompt(length=4, tasks=TASKS), "sources")
    dt.activate(model)
    data, options = Batches(mixed(), batch_size=6), TrainOptions(max_steps=steps, **OPTIONS)
    result = fit(model, adapter, data, eval_batches=data, options=options, callbacks=[dt.Distillation(weight=weight)])
    return model, adapter, result, [far(model, task) for task in TASKS]


@torch.no_grad()
def far(model: Any, task: str) -> float:
    """How far the student is from its teacher."""
    given = inputs(model, batch=8, seed=5)
    with dt.using(model, router=dt.PerRow([f"sources.{task}"])):
        student = model(**given).logits.log_softmax(-1)
    with dt.using(model, task):
        teacher = model(**given).logits.log_softmax(-1)
    return float(F.kl_div(student, teacher, reduction="batchmean", log_target=True))


def test_the_student_learns_from_its_teachers_and_only_it_learns() -> None:
    model, adapter, result, after = stage_one(weight=10.0, steps=30)
    assert not model._forward_hooks and not model._forward_pre_hooks
    before = stage_one(weight=0.0, steps=1)[3]
    assert all(a < 0.6 * b for a, b in zip(after, before, strict=True)), (after, before)
    torch.manual_seed(1)
    fresh = build()
    for i, task in enumerate(TASKS):
        torch.manual_seed(i)
        teacher = dt.attach(fresh, dt.PromptTuning(length=4), task)
        assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), dt.adapters(model)[task].parameters(),
                                                      strict=True))  # fmt: skip
    assert result.proof is not None and factors(adapter).u.grad is None


def terms(family: str, task: str, targets: torch.Tensor, weight: float = 0.9) -> tuple[float, float]:
    """What the callback adds to a loss of zero, and the same by the formula, row by row, in a loop."""
    model = build(family, task)
    sources(model)
    for i, name in enumerate(TASKS):
        torch.manual_seed(i)
        dt.attach(model, dt.PromptTuning(length=3), name)
    given = inputs(model, batch=4)
    given["attention_mask"][2, 6:] = 0
    names = ["sources.mnli", "sources.squad", "sources.mnli", "sources.sst2"]
    run = Run(model, dt.adapters(model)["sources"], steps=1, share=0.25, targets=targets, adapters=names)
    events = dt.Distillation(weight=weight).start(run)
    events.on_train_start(run)
    with dt.using(model, router=dt.PerRow(names)):
        model.train()(**given)
    got = float(events.on_loss(run, torch.zeros(())).detach())
    run.exit.close()
    kl, squares, outputs, places = 0.0, 0.0, 0, 0
    for i, name in enumerate(names):
        one = {k: v[i : i + 1] for k, v in given.items()} | {"output_hidden_states": True}
        with dt.using(model, router=dt.PerRow([name])), torch.no_grad():
            student = model(**one)
        with dt.using(model, name.partition(".")[2]), torch.no_grad():
            teacher = model(**one)
        kind = "decoder_hidden_states" if family in ("t5", "bart") else "hidden_states"
        tokens = range(9) if targets.ndim == 1 else [t for t in range(9) if targets[i, t] != -100]
        tokens = [t for t in tokens if targets.ndim > 1 or given["attention_mask"][i, t]]
        for t in tokens:
            places += 1
            squares += float((student[kind][-1][0, t] - teacher[kind][-1][0, t]).double().square().mean())
        for t in [None] if targets.ndim == 1 else tokens:
            outputs += 1
            s, p = (o.logits[0] if t is None else o.logits[0, t] for o in (student, teacher))
            p, q = p.double().softmax(-1), s.double().softmax(-1)
            kl += float((p * (p / q).log()).sum())
    return got, 0.25 * weight * (kl / outputs + squares / places)


@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
def test_the_two_terms_are_those_of_the_paper(family: str) -> None:
    targets = torch.full((4, 9), -100)
    targets[0, 2:5], targets[1, 7], targets[2, 1:6], targets[3, :3] = 5, 6, 7, 8
    got, want = terms(family, "lm", targets)
    assert want > 1e-3
    near(got, want, 1e-4)


@pytest.mark.parametrize("family", ("gpt2", "roberta"))
def test_rows_of_one_output_compare_the_states_of_all_tokens(family: str) -> None:
    got, want = terms(family, "classification", torch.tensor([0, 1, 2, 0]))
    near(got, want, 1e-4)


def test_without_weight_nothing_is_asked_of_teachers_or_student() -> None:
    model = build()
    run = Run(model, sources(model), steps=1)
    events = dt.Distillation(weight=0).start(run)
    events.on_train_start(run)
    loss = torch.ones((), requires_grad=True)
    assert events.on_loss(run, loss) is loss and not model._forward_hooks and not model._forward_pre_hooks


def test_rows_without_a_task_or_a_teacher_stop_the_run() -> None:
    model = build()
    adapter = sources(model)
    options = TrainOptions(max_steps=1, **OPTIONS)
    with pytest.raises(dt.DeltatuneError, match="no adapter 'squad'|no adapter 'mnli'|no adapter 'sst2'"):
        fit(model, adapter, Batches(mixed(), batch_size=6), options=options, callbacks=[dt.Distillation()])
    assert not model._forward_hooks and not model._forward_pre_hooks  # whatever stopped it
    plain = dt.attach(model, dt.MultitaskPrompt(length=4), "plain")
    with pytest.raises(dt.DeltatuneError, match="rows name no task.*'plain.task'"):
        fit(model, plain, Batches(documents(), batch_size=6), options=options, callbacks=[dt.Distillation()])
    with pytest.raises(dt.DeltatuneError, match=r"names its adapter, 'sources.squad', but d.jsonl:1 names none"):
        Batches([*mixed(2), *documents(2)], batch_size=2)
    with pytest.raises(dt.DeltatuneError, match="packing is on: set it to false"):
        Batches(mixed(2), batch_size=2, packing=True)


def test_rows_of_data_name_their_tasks() -> None:
    """`train` on rows with a column for it: a task without rows learns nothing of its own."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = tiny("llama", vocab_size=len(tokenizer))
    for task in TASKS[:2]:
        dt.attach(model, dt.PromptTuning(length=4), task)
    adapter = dt.attach(model, dt.MultitaskPrompt(length=4, tasks=TASKS), "sources")
    start = factors(adapter).u.detach().clone()
    rows = [{"prompt": f"{i}?", "completion": "yes", "adapter": f"sources.{TASKS[i % 2]}"} for i in range(8)]
    how = {"tokenizer": tokenizer, "batch_size": 4, "max_steps": 2, "callbacks": [dt.Distillation()]}
    train(model, adapter, rows, **how)
    moved = (factors(adapter).u.detach() - start).abs().amax((1, 2))
    assert moved[0] > 0 and moved[1] > 0 and moved[2] == 0
    with pytest.raises(dt.DeltatuneError, match=r"rows\[3\].*field 'adapter' is a number, not text"):
        train(model, adapter, [*rows[:3], {**rows[3], "adapter": 5}], **how)


def test_how_a_step_is_cut_changes_nothing() -> None:
    grads = []
    for rows in (6, 2):
        model = build()
        for i, task in enumerate(TASKS):
            torch.manual_seed(i)
            dt.attach(model, dt.PromptTuning(length=4), task)
        adapter = sources(model)
        options = TrainOptions(max_steps=1, **(OPTIONS | {"lr": 1.0}), optimizer="adamw", eps=1e3, clip=None)
        fit(model, adapter, Batches(mixed(6), batch_size=rows), options=options, callbacks=[dt.Distillation()])
        grads.append([p.detach().clone() for p in adapter.parameters()])
    start = list(sources(build()).parameters())
    moved = [(p - s) * 1e3 for p, s in zip(grads[0], start, strict=True)]  # as the gradient, for so large an eps
    assert all(m.abs().max() > 1e-4 for m in moved)
    for m, p, s in zip(moved, grads[1], start, strict=True):
        near((p - s) * 1e3, m, 2e-3)


# The second stage


@pytest.mark.parametrize("task", (None, "mnli"))
def test_a_target_starts_from_the_mean_or_from_one_source(task: str | None, tmp_path: Any) -> None:
    model = build()
    own = factors(sources(model, r=2))
    folder = dt.adapters(model)["sources"].save(tmp_path / "sources")
    mean = (own.u.mean(0), own.v.mean(0)) if task is None else (own.u[1], own.v[1])
    for source in (folder, dt.adapters(model)["sources"]):
        target = dt.attach(build(), dt.MultitaskPrompt(length=4, r=2), "target")
        transfer(target, source, task)
        mine = factors(target)
        for got, want in ((mine.shared, own.shared), (mine.u[0], mean[0]), (mine.v[0], mean[1])):
            assert torch.equal(got, want)
    if task is not None:
        given = inputs(target.model)
        with dt.using(model, router=dt.PerRow([f"sources.{task}"])):
            want = model(**given).logits
        assert torch.equal(target.model(**given).logits, want)
        dt.flatten(target)  # a prompt of that task alone, as prompt tuning's
        assert target.method == dt.PromptTuning(length=4) and [p.shape for p in target.parameters()] == [(4, 32)]
        near(target.model(**given).logits, want, 1e-6)


def test_a_run_begins_there_and_a_resumed_one_does_not_begin_again(tmp_path: Any) -> None:
    model = build()
    folder = sources(model).save(tmp_path / "sources")
    target = dt.attach(model, dt.MultitaskPrompt(length=4), "target")
    callback = dt.Transfer(source=str(folder), task="squad")
    run = Run(model, target, steps=2)
    callback.start(run).on_train_start(run)
    assert torch.equal(factors(target).u[0], factors(dt.adapters(model)["sources"]).u[0])
    with torch.no_grad():
        factors(target).u.zero_()
    run.step = 1
    callback.start(run).on_train_start(run)
    assert not factors(target).u.any()


def test_sources_that_do_not_fit_are_named(tmp_path: Any) -> None:
    model = build()
    source = sources(model)
    plain = dt.attach(model, dt.PromptTuning(length=4), "plain")
    wide = dt.attach(model, dt.MultitaskPrompt(length=4, r=2), "wide")
    with pytest.raises(dt.DeltatuneError, match="nothing in the adapter in training starts from another"):
        transfer(plain, source)
    with pytest.raises(dt.DeltatuneError, match=r"u has shape \(1, 4, 2\), its source \(4, 1\)"):
        transfer(wide, source)
    with pytest.raises(dt.DeltatuneError, match="has no task 'squat'.*'squad'"):
        transfer(wide, source, "squat")
    with pytest.raises(dt.DeltatuneError, match="adapter 'plain', a PromptTuning, holds no model.0.source.shared"):
        transfer(wide, plain)
    with pytest.raises(dt.DeltatuneError, match=r"a PromptTuning, holds no model.0.source.shared"):
        transfer(wide, plain.save(tmp_path))


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
