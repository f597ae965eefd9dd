"""Multitask prompts distilled from teachers, and targets that start from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs_of import documents
from tasked import TASKS, build, factors, near, sources
from tiny_tokenizer import tiny_tokenizer

import deltatune as dt
from deltatune.callbacks.transfer import transfer
from deltatune.core import Run
from deltatune.data import Batches, Example
from deltatune.models.tiny import inputs, tiny
from deltatune.train import train
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions


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
