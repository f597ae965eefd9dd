"""AdapterDrop's draws. Rueckle et al., EMNLP 2021. arXiv:2010.11918

    n ~ uniform {0, ..., L - 1}          one draw a step for all sites, from `seed` and the step alone

so that processes and recomputed blocks agree on it, and a resumed run goes on with it. Units below block n are out in
that step, without a gradient; after training and in evaluation all are in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import Base, Callback, Delta, DeltatuneError, Events, Intervention, Run


class Dropping(Intervention):
    """`inner`, a unit in `block`, or nothing in a training step that leaves it `out`."""

    def __init__(self, inner: Any, block: int) -> None:
        super().__init__()
        self.inner, self.block, self.out = inner, block, False

    @property
    def dropped(self) -> bool:
        return self.out and self.training

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if self.dropped else self.inner(call, *args, **kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        kinds = {type(u.inner) for u in units}
        if len(kinds) > 1:
            return NotImplemented
        place = torch.tensor([*(-1 if u.dropped else i for i, u in enumerate(units)), -1], device=rows.device)
        return kinds.pop().batched([u.inner for u in units], place[rows], call, *args, **kwargs)


class DroppingDelta(Dropping, Delta):
    def weight(self, w: Tensor) -> Tensor:
        return w if self.dropped else self.inner.weight(w)

    def bias(self, b: Tensor) -> Tensor:
        return b if self.dropped else self.inner.bias(b)

    @property
    def moves_bias(self) -> bool:
        return self.inner.moves_bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.dropped else self.inner.factors()


@dataclass(frozen=True, kw_only=True)
class DepthDraw(Callback):
    seed: int = 0

    def draw(self, step: int, blocks: int) -> int:
        return random.Random(f"{self.seed}/{step}").randrange(blocks)

    def start(self, run: Run) -> _Draws:
        units = () if run.adapter is None else run.adapter.units()
        found = [m for _, unit in units for m in unit.modules() if isinstance(m, Dropping)]
        if not found:
            raise DeltatuneError("DepthDraw: nothing in training can be dropped; use it with AdapterDrop")
        return _Draws(self, found)


class _Draws(Events):
    def __init__(self, options: DepthDraw, units: Sequence[Dropping]) -> None:
        self.options, self.units = options, units
        self.blocks = 1 + max(u.block for u in units)
        self.trained: set[nn.Parameter] = set()

    def _drop(self, n: int) -> None:
        for unit in self.units:
            unit.out = unit.block < n
        inside = {p for u in self.units for p in u.parameters()}
        alive = {p for u in self.units if not u.out for p in u.parameters()}
        for p in self.trained & inside:  # what is out is not asked for a gradient
            p.requires_grad_(p in alive)

    def on_train_start(self, run: Run) -> None:
        assert run.adapter is not None
        self.trained = {p for p in run.adapter.parameters() if p.requires_grad}
        self._drop(self.options.draw(run.step + 1, self.blocks))

    def on_step_end(self, run: Run) -> None:
        self._drop(self.options.draw(run.step + 1, self.blocks))

    def on_train_end(self, run: Run) -> None:
        self._drop(0)
