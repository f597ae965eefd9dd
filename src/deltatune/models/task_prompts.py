"""Prompts that are made of parameters, of one task or of each of several; a row of the batch names its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.errors import DeltatuneError
from deltatune.models.prompting import Layout, Prompt, prompted


class Made(nn.Module):
    """Makes the prompt (p, d) of task i, in the precision of its parameters."""

    def made(self, i: int) -> Tensor:
        raise NotImplementedError

    def forward(self, i: int = 0) -> Tensor:
        kind = next(self.parameters()).device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):  # bf16 would round small steps away
            return self.made(i)


@dataclass(frozen=True)
class Own:
    """The prompt (p, d) of one task's rows."""

    at: Layout
    prompt: Tensor

    def vectors(self) -> Tensor:
        return self.prompt

    def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        return prompted(self.at, call, self.prompt[None], None, args, kwargs)


class TaskPrompts(Prompt):
    """A prompt for each of several tasks."""

    def __init__(self, at: Layout, tasks: Sequence[str], source: Made) -> None:
        super().__init__(at, source)
        self.tasks = tuple(tasks)

    def of(self, task: str) -> Own:
        assert self.source is not None
        return Own(self.at, self.source(self.tasks.index(task)))

    def vectors(self) -> Any:
        raise DeltatuneError(
            f"a prompt of several tasks ({', '.join(self.tasks[:3])}…) needs rows that name theirs: activate it with "
            f'router=PerRow(["name.{self.tasks[0]}"]), or train it on examples that name an adapter so'
        )


def task_prompt(at: Layout, tasks: Sequence[str], source: Made) -> Prompt:
    return TaskPrompts(at, tasks, source) if len(tasks) > 1 else Prompt(at, source)


def check_tasks(owner: Any, tasks: Sequence[str]) -> None:
    """Raises DeltatuneError unless these can name the rows of a batch."""
    if len(set(tasks)) < len(tasks) or not all(isinstance(t, str) and t for t in tasks):
        raise DeltatuneError(f"{type(owner).__name__}: tasks must be different names, got {tasks}")
