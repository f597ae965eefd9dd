"""DyLoRA's rank of a step. Valipour et al., EACL 2023. arXiv:2210.07558

    b ~ uniform {r_min, ..., r}          one draw a step for all sites, from `seed` and the step alone      (alg. 1)

so that processes agree on it, and a resumed run goes on with it. After training all ranks are in effect.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import nn

from deltatune.core import Callback, DeltatuneError, Events, Run


class Rank(nn.Module):
    """b, shared by all sites of an adapter; None outside training: all ranks."""

    b: int | None = None


@dataclass(frozen=True, kw_only=True)
class RankDraw(Callback):
    r: int
    r_min: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.r_min <= self.r:
            raise DeltatuneError(f"DyLoRA: r_min must lie between 1 and r={self.r}, got {self.r_min}")

    def draw(self, step: int) -> int:
        return random.Random(f"{self.seed}/{step}").randint(self.r_min, self.r)

    def start(self, run: Run) -> _Draws:
        units = () if run.adapter is None else run.adapter.units()
        ranks = {m for _, unit in units for m in unit.modules() if isinstance(m, Rank)}
        if not ranks:
            raise DeltatuneError("RankDraw: nothing in training has nested ranks; use it with DyLoRA")
        return _Draws(self, ranks)


class _Draws(Events):
    def __init__(self, options: RankDraw, ranks: set[Rank]) -> None:
        self.options, self.ranks = options, ranks

    def _set(self, b: int | None) -> None:
        for rank in self.ranks:
            rank.b = b

    def on_train_start(self, run: Run) -> None:
        self._set(self.options.draw(run.step + 1))

    def on_step_end(self, run: Run) -> None:
        self._set(self.options.draw(run.step + 1))

    def on_train_end(self, run: Run) -> None:
        self._set(None)
