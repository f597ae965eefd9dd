"""Lottery Ticket Sparse Fine-Tuning: Composable Sparse Fine-Tuning for Cross-Lingual Transfer. Ansell et al., ACL 2022.
arXiv:2110.07560

    phase 1     train every parameter:   theta_0 -> theta_1
                M marks the K = int(density N) largest |theta_1 - theta_0| of all N parameters
    phase 2     rewind to theta_0 and train phi = M * (theta - theta_0) alone

Differences compose: with a language's adapter and a task's, both of the same theta_0, theta_0 + phi_L + phi_T is
`activate(model, "language", "task")`. Train the task's with the language's active. Both phases may add the penalty
l1 * mean |theta - theta_0|. What else the adapter trains, such as a head, is rewound with it. The schedule of the
learning rate, warm-up included, runs over each phase by itself, as the authors' does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.callbacks.selection import Selection, TwoPhases, Units, best, number, settle
from deltatune.core import Callback, Events, Method, Run, Site
from deltatune.methods.coordinates import Budget, Coordinates, check_share


@dataclass(frozen=True, kw_only=True)
class LTSFT(Method):
    """`full`: phase 1's share of the steps, at the rate `full_lr`. It needs the memory of full fine-tuning; its weights
    are not kept."""

    lr: ClassVar[float] = 5e-3
    density: float = 0.01
    full: float = 0.5
    full_lr: float = 2e-4
    l1: float = 0.0

    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density", "full")

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return Budget(self.density, sites)

    def build(self, site: Site, shared: Any) -> Coordinates:
        return Coordinates(site, shared.of(site), self)

    def callbacks(self) -> Iterable[Callback]:
        return [Selection(method=self)]

    def begin(self, run: Run, units: Units) -> Events:
        return _Phases(self, run, units)


class _Phases(TwoPhases):
    def __init__(self, method: LTSFT, run: Run, units: Units) -> None:
        super().__init__(method, method.full, run, units, method.full_lr)
        assert run.adapter is not None
        mine = {id(u.values) for u in units}
        self.others = {n: p for n, p in run.adapter.named_parameters() if id(p) not in mine}
        self.start = {n: p.detach().clone() for n, p in self.others.items()}

    def on_train_start(self, run: Run) -> None:
        super().on_train_start(run)
        self.begin_phase()

    def begin_phase(self) -> None:
        if self.turn:
            self.run.stage = (0, self.turn) if self.run.step < self.turn else (self.turn, self.run.steps)

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        if not self.method.l1:
            return loss
        total = torch.stack([u.values.abs().sum().to(loss.device) for u in self.units]).sum()
        return loss + self.method.l1 * run.share * total / number(self.units, 1)

    def choose(self) -> None:
        settle(self.units, best([u.values.abs() for u in self.units], number(self.units, self.method.density)))
        for n, p in self.others.items():
            p.copy_(self.start[n])
        self.begin_phase()

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **{f"start.{n}": t for n, t in self.start.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        for n, t in self.start.items():
            t.copy_(state[f"start.{n}"])
        self.begin_phase()
