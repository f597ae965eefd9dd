"""Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning. Wang et al., ICLR 2023. arXiv:2303.02861

    P_t = P* o (u_t v_t),   P*, P_t in R^{p x d},  u_t in R^{p x r},  v_t in R^{r x d}          (sec. 3.1)

of task t, put where prompt tuning puts its prompt. Two stages, each a run:

    1  on the source tasks together, L + lambda (KL of the teachers' outputs + MSE of their last hidden states): give
       the adapter their names as `tasks`, the examples theirs as `adapter="sources.squad"`, and train it with the
       callback `Distillation`, where the teacher of a task is the adapter of its name, a prompt trained on it alone
    2  on a target task, from P* and the mean of the u_t and of the v_t, or one of each: an adapter without `tasks`,
       and the callback `Transfer`

u v = 1 at the start, so that with r = 1 both are ones and P_t is prompt tuning's P*; PEFT draws both from
N(0, 0.02^2) and so begins with next to no prompt. Further columns of u are random, those rows of v zero: were they
alike, they would stay alike. In the end `flatten` leaves P_t alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Intervention, Site
from deltatune.methods.prompt import CrossMask, PromptTuning
from deltatune.models.prompting import Prompt
from deltatune.models.task_prompts import Made, check_tasks, task_prompt


@dataclass(frozen=True, kw_only=True)
class MultitaskPrompt(PromptTuning):
    """`length` p; `r`; `tasks`: the names of several, which rows then name; `init`: how P* starts."""

    lr: ClassVar[float] = 5e-2
    r: int = 1
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise DeltatuneError(f"MultitaskPrompt: r must be at least 1, got {self.r}")
        check_tasks(self, self.tasks)

    def flat(self) -> PromptTuning:
        if len(self.tasks) > 1:
            raise DeltatuneError(
                f"MultitaskPrompt: {len(self.tasks)} tasks have no one prompt; transfer one of them to an adapter "
                "without tasks, and flatten that"
            )
        return PromptTuning(targets=self.targets, length=self.length, init=self.init)

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        unit = super().build(site, shared)
        if isinstance(unit, CrossMask):
            return unit
        assert isinstance(unit, Prompt) and unit.prompt is not None
        return task_prompt(unit.at, self.tasks, Scaled(unit.prompt.detach(), max(1, len(self.tasks)), self.r))


class Scaled(Made):
    """`shared` P* (p, d), `u` (tasks, p, r), `v` (tasks, r, d)."""

    roles = {"shared": "prompt", "u": "scale", "v": "scale"}

    def __init__(self, start: Tensor, tasks: int, r: int) -> None:
        super().__init__()
        p, d = start.shape
        u, v = start.new_ones(tasks, p, 1), start.new_ones(tasks, 1, d)
        more = 0.02 * torch.randn(tasks, p, r - 1, dtype=start.dtype, device=start.device)
        self.shared = nn.Parameter(start)
        self.u = nn.Parameter(torch.cat([u, more], 2))
        self.v = nn.Parameter(torch.cat([v, start.new_zeros(tasks, r - 1, d)], 1))

    def made(self, i: int) -> Tensor:
        return self.shared * (self.u[i] @ self.v[i])

    def transfer(self, source: Mapping[str, Tensor], task: int | None) -> None:
        """Start every task at that task's factors, or at their means."""
        for name, p in self.named_parameters():
            s = source[name]
            s = s if name == "shared" else s.mean(0) if task is None else s[task]
            if s.shape != p.shape[p.ndim - s.ndim :]:
                raise DeltatuneError(f"MultitaskPrompt: {name} has shape {tuple(p.shape)}, its source {tuple(s.shape)}")
            p.copy_(s)
