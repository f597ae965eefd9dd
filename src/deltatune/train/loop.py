"""The training loop: micro-batches to optimizer steps, with the events of callbacks, evaluation and checkpoints.

The loss of a step is the sum over its trained tokens, in all micro-batches of all processes, over their number. So how
a step is cut into micro-batches changes nothing but memory (up to the rounding of sums).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from deltatune.core.adapter import Adapter
from deltatune.core.callback import Callback, Run
from deltatune.core.errors import DeltatuneError
from deltatune.data.encode import IGNORED
from deltatune.data.loader import Batches
from deltatune.data.packing import Batch
from deltatune.models.blocks import blocked
from deltatune.models.fused import fused
from deltatune.train import checkpoint, metrics, optimizer
from deltatune.train.checkpoint import Checkpoints, Snapshot
from deltatune.train.loss import autocast, evaluate, outcome, targets
from deltatune.train.memory import kept_freed
from deltatune.train.metrics import Log, Record, Report
from deltatune.train.options import SHARE, TrainOptions
from deltatune.train.pace import paced
from deltatune.train.process import Processes, interruptible
from deltatune.train.proof import Proof, checksums, detached, digest
from deltatune.train.recompute import recomputing
from deltatune.train.training_data import TrainingData

MAY_CHANGE = {"log_every", "save_every", "keep", "tensorboard"}  # on resume: nothing here moves a number
CARRIED = ("best", "waited", "tokens", "seconds", "finding")  # of a run, from one process to the next


class Interrupted(DeltatuneError):
    """The run was stopped by a signal, between two steps; the message says how to go on."""


@dataclass(frozen=True)
class Result:
    """`step` of `steps` were done, the last at training loss `loss`; `best` is {"step", "eval_loss"} or None.

    `kept` is the step whose weights the model was left with, `checkpoint` the last one written, `history` the records
    of this process, `tokens` and `seconds` those of the whole run, interruptions included."""

    step: int
    steps: int
    loss: float | None
    best: dict[str, Any] | None
    kept: int
    stopped_early: bool
    tokens: int
    seconds: float
    checkpoint: Path | None
    proof: str | None
    history: list[Record] = field(repr=False)


def fit(
    model: nn.Module,
    adapter: Adapter | None,
    batches: Batches,
    *,
    eval_batches: Batches | None = None,
    options: TrainOptions | None = None,
    callbacks: Sequence[Callback] = (),
    output: Path | str | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> Result:
    """Trains `adapter`, or `model` itself if None, and leaves it with the weights that `options.keep` says.

    output: receives `metrics.jsonl`, `loss.png` and `checkpoints/`; with `resume` the run there goes on, bit for bit.
    report: called with each record of `metrics.jsonl`, and with {"note": text}. In that order, each step runs
    `on_loss` per micro-batch, `on_grads`, clipping, the optimizer, `on_step_end`, evaluation, the checkpoint.
    Raises DeltatuneError: for options without effect, a loss that is not finite (with step and rows), a failed proof,
    a checkpoint that cannot be written or does not fit; Interrupted after Ctrl-C or SIGTERM."""
    with ExitStack() as stack:
        trainer = _Trainer(model, adapter, batches, eval_batches, options or TrainOptions(), callbacks,
                           None if output is None else Path(output), resume, report, stack)  # fmt: skip
        try:
            return trainer.train(stack.enter_context(interruptible()))
        except torch.OutOfMemoryError as e:
            raise DeltatuneError(
                f"step {trainer.run.step}: out of memory with {trainer.held()} in a forward pass; lower "
                "train.tokens_per_batch, which changes nothing else, or set train.activation_checkpointing to blocks"
            ) from e


class _Trainer:
    """The state of one run, and its steps in order."""

    def __init__(self, model: nn.Module, adapter: Adapter | None, batches: Batches, eval_batches: Batches | None,
                 options: TrainOptions, callbacks: Sequence[Callback], output: Path | None, resume: bool,
                 report: Report | None, stack: ExitStack) -> None:  # fmt: skip
        options.check(evaluates=eval_batches is not None, output=output)
        self.model, self.adapter, self.batches, self.held_out = model, adapter, batches, eval_batches
        self.options, self.output, self.report = options.rated(adapter.method if adapter else None), output, report
        self.checkpoints = None if output is None else Checkpoints(output)
        last = self._last(resume)
        self.processes = Processes()
        self.device, self.dtype = self.processes.device, options.dtype(self.processes.device)
        self.each = options.accumulation(batches)
        steps, self.total = options.count(batches)
        data = TrainingData(model, batches, self.device, self.dtype)
        self.run = Run(model, adapter, steps, losses=data.losses, examples=data.examples, exit=stack)
        if not getattr(model, "hf_device_map", None) and any(p.device != self.device for p in model.parameters()):
            model.to(self.device)
        stack.enter_context(_prepared(model, adapter, options))
        stack.enter_context(blocked(model) if batches.blocked else nullcontext())
        stack.enter_context(fused(model))
        self.pace = stack.enter_context(paced(model, options.speed, options.activation_checkpointing))
        self.processes.share(list(checkpoint.weights(model, adapter).values()))
        stack.enter_context(kept_freed() if self.device.type == "cpu" else nullcontext())
        set_seed(options.seed)

        sums = checksums(model, {id(p) for p in self._parameters()})
        self.base = digest(sums)
        given = [*([] if adapter is None else adapter.callbacks()), *callbacks]
        self.names = [type(c).__name__ for c in given]
        self.events, self.passes = [c.start(self.run) for c in given], max((c.passes for c in given), default=1)
        self.optimizer = self.run.optimizer = self._optimizer()
        self.best: dict[str, Any] | None = None
        self.waited, self.tokens, self.seconds = 0, 0, 0.0
        self.finding: str | None = None
        if snapshot := None if last is None else checkpoint.read(last):
            self._check(snapshot.state)
            self.run.step = snapshot.state["step"]
        for events in self.events:
            events.on_train_start(self.run)
        if snapshot:
            self._restore(snapshot)
        self.proof = None if self.run.step else Proof(self.run, sums, rests=bool(given))
        self.log = None
        if output is not None and self.processes.main:
            self.log = Log(output, self.run.step, options.tensorboard)
            stack.callback(self._close)
        self.history, self.saved, self.unlogged = list[Record](), last, 0
        self.began = self.since = time.perf_counter()

    def train(self, interrupted: list[int]) -> Result:
        run, options = self.run, self.options
        eval_every = options.eval_every or max(1, run.steps // SHARE)
        save_every = options.save_every or max(1, run.steps // SHARE)
        loss: float | None = None
        self._note(f"{run.steps:,} steps of {self.each} micro-batches on {self.device}, {str(self.dtype)[6:]}")
        while run.step < run.steps and not self._early():
            if self.processes.any(bool(interrupted)):
                self._interrupt()
            run.step += 1
            began = time.perf_counter()
            record = {"step": run.step, "steps": run.steps, **self._step()}
            loss = record["loss"]
            self.pace.step(time.perf_counter() - began, record["tokens"], run.steps - run.step, self._note)
            over, improved = run.step == run.steps, False
            logs = run.step % options.log_every == 0 or over
            record = record | self._speed() if logs else {"step": run.step, "steps": run.steps}
            if self.held_out is not None and (run.step % eval_every == 0 or over):
                began = time.perf_counter()
                found = evaluate(self.model, self.held_out, self.dtype, self.processes)
                self.since += time.perf_counter() - began  # tokens/s are those of training
                improved = self._compare(found["eval_loss"])
                record |= found
            if len(record) > 2:
                self._record(record)
            if self.output is not None and (improved or over or run.step % save_every == 0 or self._early()):
                self._save()
        for events in self.events:
            events.on_train_end(run)
        kept = self._keep()
        return Result(run.step, run.steps, loss, self.best, kept, self._early() and run.step < run.steps, self.tokens,
                      self._elapsed(), self.saved, self.finding, self.history)  # fmt: skip

    def held(self) -> str:
        """What a micro-batch holds, in words."""
        tokens, rows = self.batches.tokens_per_batch, self.batches.batch_size
        return f"{tokens} tokens" if tokens else f"{rows} rows of up to {self.batches.capacity} tokens"

    def _step(self) -> Record:
        """One optimizer step."""
        run, options, task = self.run, self.options, self.batches.task
        micro = list(islice(self.batches, min(self.each, self.total - (run.step - 1) * self.each)))
        counts = [int((targets(batch, task) != IGNORED).sum()) for batch in micro]
        trained, tokens = map(int, self.processes.sum([sum(counts), sum(batch.tokens for batch in micro)]))
        if not trained:
            raise DeltatuneError(f"step {run.step}: no token carries loss in {_rows(micro)}; see `deltatune data show`")
        begin, end = run.stage or (0, run.steps)
        factor = options.factor(run.step - begin, end - begin)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        losses = []
        for batch, count in zip(micro, counts, strict=True):
            run.share, run.targets, run.adapters = count / trained, targets(batch, task), batch.adapters
            with autocast(self.device, self.dtype):
                found = outcome(self.model, batch.to(self.device), task, self.passes, options.label_smoothing)
            loss, run.logits = found.total / trained, found.logits
            for events in self.events:
                loss = events.on_loss(run, loss)
            if not loss.requires_grad:
                raise detached(run)
            loss.backward()
            losses.append(torch.stack([found.total.detach(), loss.detach().float()]))
        values = torch.stack(losses)
        if not bool(values.isfinite().all()):
            bad = [batch for batch, finite in zip(micro, values.isfinite().all(1).tolist(), strict=True) if not finite]
            raise self._not_finite("loss", bad)
        parameters = list(self._parameters())
        self.processes.sum_gradients(parameters)
        for events in self.events:
            events.on_grads(run)
        if self.proof is not None:
            self.proof.after_backward(run)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            raise self._not_finite("norm of the gradients", micro)
        if options.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, options.clip, norm)
        self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        if self.proof is not None and (finding := self.proof.after_step(run, trained)) is not None:
            self.finding, self.proof = finding, None
            self._note(finding)
        for events in self.events:
            events.on_step_end(run)
        self.optimizer.zero_grad(set_to_none=True)
        (summed,) = self.processes.sum([float(values[:, 0].double().sum())])
        self.tokens, self.unlogged = self.tokens + tokens, self.unlogged + tokens
        return {"loss": summed / trained, "lr": lr, "grad_norm": float(norm), "tokens": tokens,
                "trained_tokens": trained}  # fmt: skip

    def _compare(self, loss: float) -> bool:
        if self.run.step < self.run.keep_from:
            return False
        if loss == loss and (self.best is None or loss < self.best["eval_loss"]):
            self.best, self.waited = {"step": self.run.step, "eval_loss": loss}, 0
            return True
        self.waited += 1
        return False

    def _early(self) -> bool:
        return self.options.early_stop is not None and self.waited >= self.options.early_stop

    def _optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        trained = [p for p in self._parameters() if p.requires_grad]
        if not trained:
            raise DeltatuneError("nothing to train: every parameter is frozen; attach an adapter, or set requires_grad")
        groups = optimizer.groups(trained, self.adapter, options)
        for events in self.events:
            groups = events.param_groups(groups)
        groups = [{"lr": options.lr, **g, "initial_lr": g.get("lr", options.lr)} for g in groups if g["params"]]
        return optimizer.make(groups, options, self.device)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters() if self.adapter is None else self.adapter.parameters()

    def _last(self, resume: bool) -> Path | None:
        last = None if self.checkpoints is None else self.checkpoints["last"]
        if resume and self.output is None:
            raise DeltatuneError("resume needs the output folder of the run to go on with")
        if resume and last is None:
            raise DeltatuneError(f"resume: {self.output} holds no checkpoint; start the run without resume")
        if last is not None and not resume:
            raise DeltatuneError(f"{self.output} holds a run ({last.name}); resume it, or choose another output")
        return last

    def _state(self) -> dict[str, Any]:
        """What must be the same on resume."""
        method = getattr(self.adapter, "method", None)
        try:
            told = None if method is None else method.to_dict()
        except DeltatuneError:  # targets given as code
            told = None
        return {"options": self.options.model_dump(mode="json", exclude=MAY_CHANGE), "steps": self.run.steps,
                "method": told, "callbacks": self.names, "base": self.base,
                "world": self.processes.world, "dtype": str(self.dtype)}  # fmt: skip

    def _check(self, saved: dict[str, Any]) -> None:
        now, was = self._state(), {**saved, **saved["options"]}
        for name, value in {**now.pop("options"), **now}.items():
            if value != was.get(name):
                told = (f"{name} was {was.get(name)!r} in the saved run and is {value!r} now" if name != "base"
                        else "the base model is not the one that the saved run began with")  # fmt: skip
                raise DeltatuneError(f"resume: {told}; restore it, or start a new run in another folder")

    def _save(self) -> None:
        rng = self.processes.gather(checkpoint.random_state())
        if self.processes.main:
            assert self.checkpoints is not None and self.log is not None
            values, rest = checkpoint.optimizer_state(self.optimizer)
            callbacks = {f"{i}.{k}": t for i, e in enumerate(self.events) for k, t in e.state_dict().items()}
            weights = checkpoint.weights(self.model, self.adapter)
            state = {"step": self.run.step, **self._state(), **{k: getattr(self, k) for k in CARRIED},
                     "cursor": self.batches.state_dict(), "optimizer": rest, "random": rng}  # fmt: skip
            state["seconds"] = self._elapsed()
            self.log.sync()
            self.checkpoints.save(Snapshot(state, {"weights": weights, "optimizer": values, "callbacks": callbacks}))
        self.processes.wait()
        if self.checkpoints is not None:
            self.saved = self.checkpoints["last"]

    def _restore(self, snapshot: Snapshot) -> None:
        state, tensors = snapshot.state, snapshot.tensors
        checkpoint.restore_weights(self.model, self.adapter, tensors["weights"])
        checkpoint.restore_optimizer(self.optimizer, tensors["optimizer"], state["optimizer"])
        for i, events in enumerate(self.events):
            mine = {k.removeprefix(f"{i}."): t for k, t in tensors["callbacks"].items() if k.startswith(f"{i}.")}
            events.load_state_dict(mine)
        self.batches.load_state_dict(state["cursor"])
        for name in CARRIED:
            setattr(self, name, state[name])
        checkpoint.restore_random(state["random"][self.processes.rank])

    def _keep(self) -> int:
        """Leaves the model with the weights asked for; their step."""
        if self.checkpoints is None or self.best is None or self.options.keep == "last":
            return self.run.step
        if self.best["step"] != self.run.step and (path := self.checkpoints["best"]) is not None:
            checkpoint.restore_weights(self.model, self.adapter, checkpoint.read(path).tensors["weights"])
            self._note(f"kept the weights of step {self.best['step']}, the best by evaluation loss")
        return self.best["step"]

    def _interrupt(self) -> None:
        told = f"interrupted after step {self.run.step} of {self.run.steps}"
        if self.output is None or not self.run.step:
            raise Interrupted(f"{told}; nothing is saved{'' if self.output else ', for want of an output folder'}")
        if self.saved is None or self.saved.name != f"step-{self.run.step}":
            self._save()
        raise Interrupted(f"{told}; saved {self.saved}; run the same again with resume to go on from there")

    def _not_finite(self, what: str, micro: Sequence[Batch]) -> DeltatuneError:
        kept = f"; {self.saved} is kept" if self.saved else ""
        return DeltatuneError(
            f"step {self.run.step}: the {what} is not finite, from {_rows(micro)}; lower lr, look at these rows, "
            f"or set precision to fp32{kept}"
        )

    def _speed(self) -> Record:
        now = time.perf_counter()
        rate, self.since, self.unlogged = self.unlogged / max(now - self.since, 1e-9), now, 0
        return {"tokens_per_second": round(rate, 1), "memory": metrics.memory(self.device)}

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def _record(self, record: Record) -> None:
        self.history.append(record)
        if self.log is not None:
            self.log.write(record)
        if self.report is not None and self.processes.main:
            self.report(record)

    def _note(self, text: str) -> None:
        if self.report is not None and self.processes.main:
            self.report({"note": text})

    def _close(self) -> None:
        assert self.log is not None and self.output is not None
        self.log.close()
        with suppress(DeltatuneError):  # on a full disk: whatever ends the run matters more than its picture
            metrics.draw(metrics.read(self.log.path), self.output / metrics.CURVE)


def _rows(micro: Sequence[Batch]) -> str:
    origins = [origin for batch in micro for row in batch.origins for origin in row]
    return ", ".join(origins[:5]) + (f" and {len(origins) - 5} more rows" if len(origins) > 5 else "")


@contextmanager
def _prepared(model: Any, adapter: Adapter | None, options: TrainOptions) -> Iterator[None]:
    """The model in training mode, without a cache, with nothing but the adapter learning; as it was, afterwards."""
    mine = set() if adapter is None else {id(p) for p in adapter.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in mine] if adapter is not None else []
    training, config = model.training, getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        for p in others:
            p.requires_grad_(False)
        if cached is not None:
            config.use_cache = False  # type: ignore[union-attr]
        with recomputing(model, options.activation_checkpointing):
            yield model.train()
    finally:
        for p in others:
            p.requires_grad_(True)
        if cached is not None:
            config.use_cache = cached  # type: ignore[union-attr]
        model.train(training)
