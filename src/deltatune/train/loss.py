"""The loss of a batch: a sum over its trained tokens, in fp32, with logits made only where they are needed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.errors import DeltatuneError
from deltatune.core.surgery import using
from deltatune.data.encode import IGNORED, Task
from deltatune.data.loader import Batches
from deltatune.data.packing import Batch
from deltatune.models.blocks import layout
from deltatune.routers.per_row import PerRow
from deltatune.train.head import loss_by_chunks, only
from deltatune.train.process import Processes


class Outcome(NamedTuple):
    """`total` is the sum of the losses in nats, `targets` how many it is over, `correct` how many were hit; `logits`
    (targets, classes) are there for each pass, if there are several."""

    total: Tensor
    targets: int
    correct: Tensor
    logits: tuple[Tensor, ...] = ()


def targets(batch: Batch, task: Task) -> Tensor:
    """What each output position is to say, -100 where nothing: [b, T], or [b] for classification.

    A causal position predicts the next token, so labels move by one; the last predicts nothing."""
    return F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED) if task == "causal" else batch.labels


def outcome(model: nn.Module, batch: Batch, task: Task, passes: int = 1, smoothing: float = 0.0) -> Outcome:
    """Cross-entropy of `batch`, summed, with rows under the adapters that they name.

    passes: forward passes, each with random draws of its own; the loss is that of the first.
    smoothing: the share of each target that is spread evenly over all classes.
    Raises DeltatuneError when the model's logits do not fit the labels."""
    rows = nullcontext() if batch.adapters is None else using(model, router=PerRow(batch.adapters))
    with layout(batch.blocks), rows:
        return _outcome(model, batch, task, passes, smoothing)


def _outcome(model: nn.Module, batch: Batch, task: Task, passes: int, smoothing: float) -> Outcome:
    wanted = targets(batch, task)
    inputs = dict(batch.inputs)
    if task == "seq2seq" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(model, batch.labels)
    generates = task in ("causal", "seq2seq")
    if generates and passes == 1:
        found = loss_by_chunks(model, inputs, wanted, IGNORED, smoothing)
        if found is not None:
            return Outcome(*found)
    every = [_logits(model, inputs, wanted, task) for _ in range(passes)]
    logits = every[0]
    wanted = wanted[wanted != IGNORED].to(logits.device)
    total = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing)
    hits = (logits.detach().argmax(-1) == wanted).sum()
    return Outcome(total, len(wanted), hits, tuple(every) if passes > 1 else ())


def _logits(model: nn.Module, inputs: dict[str, Any], wanted: Tensor, task: Task) -> Tensor:
    """(n, classes) in fp32, of the n positions with a target."""
    trained = wanted != IGNORED
    with only(model, trained) if task in ("causal", "seq2seq") else nullcontext():
        logits = model(**inputs).logits
    if logits.shape[:-1] == wanted.shape:
        logits = logits[trained]
    elif logits.shape[:-1] == (1, int(trained.sum())):
        logits = logits[0]
    else:
        raise DeltatuneError(
            f"the model gives logits of shape {tuple(logits.shape)} for labels of shape {tuple(wanted.shape)}, "
            f"which does not suit the task {task!r}; load it with the head of that task"
        )
    return logits.float()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, dtype: torch.dtype = torch.float32, processes: Processes | None = None
) -> dict[str, float]:
    """`eval_loss`, the mean over the trained tokens of one pass; for classes and tags also `eval_accuracy`.

    Without dropout; the model is left in the mode it was in."""
    processes = processes or Processes()
    training, sums = model.training, torch.zeros(3, dtype=torch.float64)
    model.eval()
    try:
        for batch in batches.once():
            with autocast(processes.device, dtype):
                found = outcome(model, batch.to(processes.device), batches.task)
            sums += torch.tensor([found.total.item(), found.targets, found.correct.item()], dtype=torch.float64)
    finally:
        model.train(training)
    total, count, correct = processes.sum(sums.tolist())
    accuracy = {"eval_accuracy": correct / count} if batches.task in ("classification", "tagging") else {}
    return {"eval_loss": total / count, **accuracy}


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise DeltatuneError(
            f"{type(model).__name__} is no encoder-decoder language model; load one, or set the task to causal"
        )
    return model.prepare_decoder_input_ids_from_labels(labels=labels)
