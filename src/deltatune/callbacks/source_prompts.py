"""Giving an autoencoder the tuned prompts that it learns to make again: how the first stage of Intrinsic Prompt Tuning
begins (arXiv:2110.07867, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.callbacks.transfer import tasks_of
from deltatune.core import Adapter, Callback, DeltatuneError, Events, Run, nearest, read_adapter

Source = Tensor | Adapter | str | Path


@torch.no_grad()
def give(adapter: Any, prompts: Mapping[str, Source]) -> None:
    """Give `adapter`, an `IntrinsicSubspace`, the prompt (p, d) of each of its tasks: a tensor, an adapter or a folder.

    Raises DeltatuneError when they do not fit it."""
    found = [m for _, unit in adapter.units() for m in unit.modules() if hasattr(m, "given")]
    if len(found) != 1:
        raise DeltatuneError("source prompts: no autoencoder is in training; leave them out")
    (own,), tasks = found, tasks_of(adapter.method)
    if odd := sorted(set(prompts) ^ set(tasks)):
        told = f"no task {odd[0]!r}{nearest(odd[0], tasks)}" if odd[0] in prompts else f"no prompt of task {odd[0]!r}"
        raise DeltatuneError(f"source prompts: there is {told}; the adapter's tasks are {', '.join(tasks) or 'none'}")
    tensors = [tuned(adapter.model, task, prompts[task]) for task in tasks]
    for task, t in zip(tasks, tensors, strict=True):
        if t.shape != own.prompts.shape[1:]:
            p, d = own.prompts.shape[1:]
            raise DeltatuneError(
                f"source prompts: that of {task} is {tuple(t.shape)}; the adapter has length {p}, and "
                f"{type(adapter.model).__name__} embeds in {d}"
            )
    own.prompts.copy_(torch.stack([t.to(own.prompts) for t in tensors]))
    own.given.fill_(True)


def tuned(model: nn.Module, task: str, source: Source) -> Tensor:
    """(p, d), of a tensor, or of an adapter of prompt tuning, ours or PEFT's."""
    if isinstance(source, Tensor):
        return source.detach()
    tensors = source.state_dict() if isinstance(source, Adapter) else read_adapter(model, source)[1]
    found = [t for n, t in tensors.items() if n.rpartition(".")[2] == "prompt"]
    if len(found) != 1:
        raise DeltatuneError(f"source prompts: {task}: {source} is no adapter of prompt tuning; flatten other prompts")
    return found[0].detach()


@dataclass(frozen=True, kw_only=True)
class SourcePrompts(Callback):
    """`prompts`: for each task of the adapter in training, the folder of an adapter of prompt tuning."""

    prompts: Mapping[str, str]

    def start(self, run: Run) -> Events:
        return _Given(self.prompts)


class _Given(Events):
    def __init__(self, prompts: Mapping[str, str]) -> None:
        self.prompts = prompts

    def on_train_start(self, run: Run) -> None:
        if run.step == 0:
            give(run.adapter, self.prompts)
