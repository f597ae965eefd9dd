from __future__ import annotations

import dataclasses
import math
import signal
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from runs import documents, model_and_adapter, packed_batches, whole_run
from torch import Tensor, nn

from deltatune.core import Callback, Events, Run, activate, attach
from deltatune.core.errors import DeltatuneError
from deltatune.data import Batch, Batches, Example
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny
from deltatune.train.loop import Interrupted, fit
from deltatune.train.options import TrainOptions


def _rows(n: int = 12) -> list[Example]:
    return documents(n, seed=3, longest=14)


def _weights(adapter: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in adapter.state_dict().items()}


def test_three_steps_are_adamw_by_hand_in_float64() -> None:
    """Decoupled weight decay (arXiv:1711.05101, alg. 2), clipping by the global norm, the linear schedule."""
    options = TrainOptions(max_steps=3, batch_size=4, lr=3e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, clip=0.5,
                           warmup=2)  # fmt: skip
    model, adapter = model_and_adapter()
    reference = tiny("llama").double()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    twin = attach(reference, LoRA(r=4), dtype=torch.float64)
    twin.load_state_dict(_weights(adapter))
    rows = _rows()
    result = fit(model, adapter, Batches(rows, batch_size=2, seed=5), options=options)

    source = Batches(rows, batch_size=4, seed=5)
    parameters = list(twin.parameters())
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in (1, 2, 3):
        lr = 3e-2 * {1: 1 / 2, 2: 1.0, 3: 1 - 1 / 2}[step]
        batch = next(source)
        logits = reference(**batch.inputs).logits
        chosen = [
            -torch.log_softmax(logits[i, t], 0)[batch.labels[i, t + 1]]
            for i in range(4)
            for t in range(batch.labels.shape[1] - 1)
            if batch.labels[i, t + 1] != -100
        ]
        loss = torch.stack(chosen).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        record = result.history[step - 1]
        assert (record["loss"], record["lr"]) == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(lr))
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert record["trained_tokens"] == len(chosen)
        with torch.no_grad():
            for p, g, a, b in zip(parameters, gradients, m, v, strict=True):
                g = g * min(1.0, 0.5 / (norm + 1e-6))
                p.mul_(1 - lr * 0.1)
                a.mul_(0.8).add_(0.2 * g)
                b.mul_(0.95).add_(0.05 * g * g)
                p.sub_(lr * (a / (1 - 0.8**step)) / ((b / (1 - 0.95**step)).sqrt() + 1e-6))
    for p, q in zip(adapter.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("clip", [1.0, None])
def test_micro_batches_change_nothing(clip: float | None) -> None:
    """Rows of 5 to 14 tokens: averaging means instead of summing tokens would show at once."""
    found = []
    for size in (1, 2, 4, 8):
        model, adapter = model_and_adapter()
        batches = Batches(_rows(20), batch_size=size)
        options = TrainOptions(epochs=2, batch_size=8, lr=1e-2, eps=1e-4, clip=clip)
        result = fit(model, adapter, batches, options=options)
        assert result.step == (6 if size == 8 else 5)
        first = result.history[:2]
        found.append(([r["loss"] for r in first], [r["grad_norm"] for r in first], _weights(adapter)))
    for losses, norms, _ in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-6)
        assert norms == pytest.approx(found[0][1], rel=1e-5)
    for _, _, weights in found[1:3]:  # the same 40 rows; batches of 8 also cut each epoch
        for k, t in weights.items():
            torch.testing.assert_close(t, found[0][2][k], rtol=1e-4, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Scribe(Callback):
    """Writes its events down, adds 0.5 to the loss of a step, doubles the rate of `b`, freezes nothing."""

    lines: tuple[Any, ...] = ()

    def start(self, run: Run) -> Events:
        return _Scribe(self.lines[0], run)


class _Scribe(Events):
    def __init__(self, lines: list[str], run: Run) -> None:
        self.lines, self.run = lines, run
        lines.append(f"start {run.step}/{run.steps} {run.optimizer is None}")

    def param_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.lines.append(f"groups {groups[0]['lr']}")
        assert self.run.adapter is not None
        up = {id(p) for role, p in self.run.adapter.roles() if role == "up"}
        (g,) = groups
        return [
            {**g, "params": [p for p in g["params"] if id(p) not in up]},
            {**g, "params": [p for p in g["params"] if id(p) in up], "lr": 2 * g["lr"]},
        ]

    def on_train_start(self, run: Run) -> None:
        self.lines.append(f"train {len(run.optimizer.param_groups)}")  # type: ignore[union-attr]

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        self.lines.append(f"loss {run.step}")
        return loss + 0.5 * run.share  # type: ignore[attr-defined]

    def on_grads(self, run: Run) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.adapter.parameters() if p.grad is not None])  # type: ignore[union-attr]
        self.lines.append(f"grads {run.step} {norm > 0.01}")

    def on_step_end(self, run: Run) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in run.adapter.parameters() if p.grad is not None])  # type: ignore[union-attr]
        assert norm <= 0.0101  # clipped, and not yet cleared
        self.lines.append(f"end {run.step} {[g['lr'] for g in run.optimizer.param_groups]}")  # type: ignore[union-attr]


def test_callbacks_see_every_event_in_order() -> None:
    lines: list[str] = []
    model, adapter = model_and_adapter()
    options = TrainOptions(max_steps=2, batch_size=4, lr=0.5, schedule="constant", warmup=0, clip=0.01)
    scribe = Scribe(lines=(lines,))
    fit(model, adapter, Batches(_rows(), batch_size=2), options=options, callbacks=[scribe])
    step = ["loss {0}", "loss {0}", "grads {0} True", "end {0} [0.5, 1.0]"]
    want = ["start 0/2 True", "groups 0.5", "train 2", *(s.format(i) for i in (1, 2) for s in step)]
    assert lines == want


def test_the_model_is_left_as_it_was_but_for_the_adapter() -> None:
    model, adapter = model_and_adapter()
    other = attach(model, LoRA(r=2), "other")
    model.config.use_cache = True
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mine = {id(p) for p in adapter.parameters()}
    activate(model, "default", "other")
    options = TrainOptions(max_steps=2, batch_size=4, activation_checkpointing=True)
    fit(model, adapter, Batches(_rows(), batch_size=4), options=options)
    after = model.state_dict(keep_vars=True)
    changed = [k for k, v in before.items() if not torch.equal(v, after[k])]
    assert changed and all(id(after[k]) in mine for k in changed)
    assert not model.training and model.config.use_cache is True and not model.is_activation_checkpointing
    assert all(p.requires_grad for p in (*other.parameters(), *adapter.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_checkpointed_activations_give_the_same_run() -> None:
    runs = [whole_run(None, steps=3, activation_checkpointing=on)[2].history for on in (False, True)]
    assert [r["loss"] for r in runs[0]] == pytest.approx([r["loss"] for r in runs[1]], rel=1e-6)


def test_without_an_adapter_the_model_itself_trains() -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.named_parameters()}
    result = fit(model, None, Batches(_rows(), batch_size=4), options=TrainOptions(max_steps=8, batch_size=4, lr=1e-2))
    assert all(not torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.5
    model.requires_grad_(False)
    with pytest.raises(DeltatuneError, match="every parameter is frozen"):
        fit(model, None, Batches(_rows(), batch_size=4), options=TrainOptions(max_steps=1, batch_size=4))


@pytest.mark.parametrize(("task", "family", "head"), [
    ("seq2seq", "t5", "lm"), ("classification", "bert", "classification"), ("tagging", "distilbert", "tokens"),
])  # fmt: skip
def test_other_tasks_learn(task: Any, family: str, head: str) -> None:
    torch.manual_seed(0)
    model = tiny(family, head)
    adapter = attach(model, LoRA(r=8))
    labels = {"seq2seq": ([3, 2], [4, 2], [5, 2]), "classification": ([0], [1], [2]), 
              "tagging": ([-100, 0], [-100, 1], [-100, 2])}  # fmt: skip
    rows = [Example([10 + i % 3, 20], labels[task][i % 3], f"r:{i}") for i in range(12)]
    options = TrainOptions(max_steps=30, batch_size=12, lr=2e-2, eval_every=15)
    batches, held_out = (Batches(rows, task=task, batch_size=n) for n in (12, 5))
    result = fit(model, adapter, batches, eval_batches=held_out, options=options)
    evaluations = [r for r in result.history if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [15, 30]
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert ("eval_accuracy" in evaluations[-1]) == (task != "seq2seq")
    assert evaluations[-1].get("eval_accuracy", 1.0) > 0.9


def test_bf16_computes_in_bf16_and_keeps_the_adapter_in_fp32() -> None:
    model, adapter = model_and_adapter()
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    options = TrainOptions(max_steps=1, batch_size=4, precision="bf16")
    fit(model, adapter, Batches(_rows(), batch_size=4), options=options)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_early_stopping_counts_evaluations_and_the_best_weights_are_kept(tmp_path: Any) -> None:
    """Held-out rows that contradict the training rows: the loss on them rises from the start."""
    model, adapter = model_and_adapter()
    kept: dict[int, dict[str, Tensor]] = {}
    train = [Example([5, 6, 7, 8], [-100, 6, 7, 8], "t") for _ in range(4)]
    held_out = [Example([5, 6, 7, 8], [-100, 50, 51, 52], "h")]

    def report(record: Any) -> None:
        if "eval_loss" in record:
            kept[record["step"]] = _weights(adapter)

    options = TrainOptions(max_steps=40, batch_size=4, lr=1e-2, eval_every=2, early_stop=3)
    result = fit(model, adapter, Batches(train, batch_size=4), eval_batches=Batches(held_out, batch_size=1),
                 options=options, output=tmp_path, report=report)  # fmt: skip
    evals = {r["step"]: r["eval_loss"] for r in result.history if "eval_loss" in r}
    best = min(evals, key=evals.__getitem__)
    assert result.stopped_early and result.step == best + 3 * 2 < 40
    assert result.best == {"step": best, "eval_loss": evals[best]} and result.kept == best
    assert all(torch.equal(v, kept[best][k]) for k, v in adapter.state_dict().items())
    assert (tmp_path / "checkpoints" / "best").read_text() == f"step-{best}"


class _Poisoned(Batches):
    """The eighth batch is bad."""

    drawn = 0

    def __next__(self) -> Batch:
        batch, self.drawn = super().__next__(), self.drawn + 1
        bad = {"origins": [["bad.jsonl:7"]], "inputs": batch.inputs | {"bad": True}}
        return dataclasses.replace(batch, **bad) if self.drawn == 8 else batch  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_names_the_step_and_the_rows(tmp_path: Any) -> None:
    model, adapter = model_and_adapter()
    batches = _Poisoned(documents(), packing=True, max_length=32, tokens_per_batch=64)

    def poison(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        module.poisoned = kwargs.pop("bad", False)  # type: ignore[assignment]
        return args, kwargs

    model.register_forward_pre_hook(poison, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan") if model.poisoned else out)
    before: dict[str, Tensor] = {}
    options = TrainOptions(max_steps=9, tokens_per_step=128, save_every=2)
    with pytest.raises(DeltatuneError, match=r"step 4: the loss is not finite, from bad.jsonl:7.*step-2 is kept") as e:
        fit(model, adapter, batches, options=options, output=tmp_path,
            report=lambda r: before.update(_weights(adapter)) if r.get("step") == 3 else None)  # fmt: skip
    assert "lower lr" in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    assert (tmp_path / "checkpoints" / "last").read_text() == "step-2"


def test_gradients_that_are_not_finite_stop_the_run() -> None:
    model, adapter = model_and_adapter()
    next(adapter.parameters()).register_hook(lambda g: g * float("inf"))
    with pytest.raises(DeltatuneError, match="step 1: the norm of the gradients is not finite, from d.jsonl"):
        fit(model, adapter, packed_batches(), options=TrainOptions(max_steps=1, tokens_per_step=64))


def test_running_out_of_memory_names_the_remedy() -> None:
    model, adapter = model_and_adapter()

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.lm_head.register_forward_hook(full)
    with pytest.raises(DeltatuneError, match="step 1: out of memory with 64 tokens .*lower train.tokens_per"):
        fit(model, adapter, packed_batches(), options=TrainOptions(max_steps=1, tokens_per_step=64))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Any, number: signal.Signals) -> None:
    *_, whole = whole_run(None, steps=6)
    handler = signal.getsignal(number)

    @dataclass(frozen=True, kw_only=True)
    class Stop(Callback):
        def start(self, run: Run) -> Events:
            events = Events()
            events.on_grads = lambda run: signal.raise_signal(number) if run.step == 3 else None  # type: ignore[method-assign]
            return events

    with pytest.raises(Interrupted, match=r"after step 3 of 6; saved .*step-3; run the same again with resume"):
        whole_run(tmp_path, steps=6, callbacks=[Stop()])
    assert signal.getsignal(number) == handler
    *_, rest = whole_run(tmp_path, steps=6, resume=True, callbacks=[Stop()])
    assert [r["loss"] for r in rest.history] == [r["loss"] for r in whole.history[3:]]
    with pytest.raises(Interrupted, match="nothing is saved"):
        whole_run(None, steps=6, callbacks=[Stop()])


def test_log_every_writes_the_chosen_steps_and_the_last() -> None:
    *_, result = whole_run(None, steps=7, log_every=3, eval_every=5)
    assert [(r["step"], "loss" in r, "eval_loss" in r) for r in result.history] == [
        (3, True, False), (5, False, True), (6, True, False), (7, True, True),
    ]  # fmt: skip
    assert all(r["tokens_per_second"] > 0 and r["memory"] > 1e7 for r in result.history if "loss" in r)
    assert result.tokens >= sum(r["tokens"] for r in result.history if "loss" in r)


def test_the_seed_decides_dropout() -> None:
    a, b, c = (whole_run(None, steps=3, seed=s)[2].history[-1]["loss"] for s in (0, 0, 1))
    assert a == b != c
