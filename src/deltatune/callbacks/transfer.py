"""Beginning with what another adapter has learned: the second stage of methods that have two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltatune.core import Adapter, Callback, DeltatuneError, Events, Run, nearest, read_adapter


@torch.no_grad()
def transfer(adapter: Any, source: Adapter | str | Path, task: str | None = None) -> None:
    """Start `adapter` from `source`, an attached adapter or the folder of a saved one: from what its tasks have in
    common, and what is the own of `task`, or all tasks' mean.

    Raises DeltatuneError when the source has nothing for it, or no such task."""
    if isinstance(source, Adapter):
        method, tensors = source.method, source.state_dict()
    else:
        method, tensors = read_adapter(adapter.model, source)  # type: ignore[assignment]
    tasks = tasks_of(method)
    if task is not None and task not in tasks:
        raise DeltatuneError(f"transfer: {_named(source)} has no task {task!r}{nearest(task, tasks)}")
    index = None if task is None else tasks.index(task)
    found = [(f"{n}.{path}.".replace("..", "."), m) for n, u in adapter.units() for path, m in u.named_modules()
             if hasattr(m, "transfer")]  # fmt: skip
    if not found:
        raise DeltatuneError("transfer: nothing in the adapter in training starts from another; leave it out")
    for prefix, module in found:
        mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        try:
            module.transfer(mine, index)
        except KeyError as error:
            raise DeltatuneError(
                f"transfer: {_named(source)}, a {type(method).__name__}, holds no {prefix}{error.args[0]}"
            ) from None


def tasks_of(method: Any) -> list[str]:
    """The names of the tasks that rows under an adapter of `method` may name."""
    return [t for part in method.parts() for t in getattr(part, "tasks", ())]


def _named(source: Adapter | str | Path) -> str:
    return f"adapter {source.name!r}" if isinstance(source, Adapter) else str(source)


@dataclass(frozen=True, kw_only=True)
class Transfer(Callback):
    """Starts the adapter, before the first step, from that in the folder `source`: `transfer`."""

    source: str
    task: str | None = None

    def start(self, run: Run) -> Events:
        return _Transfer(self)


class _Transfer(Events):
    def __init__(self, options: Transfer) -> None:
        self.options = options

    def on_train_start(self, run: Run) -> None:
        if run.step == 0:
            transfer(run.adapter, self.options.source, self.options.task)
