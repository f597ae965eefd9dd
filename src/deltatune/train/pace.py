"""Whether the blocks of a model run compiled, which is measured rather than believed.

Compiling takes a minute or so and pays only in a run that is long enough, if it pays at all: how much is left to win
beside kernels that are fused by hand depends on the processor. `auto` therefore tries it only where what is
left of the run is `WORTH` times the `WARM_UP`, so that a failed trial costs no more than that share of the run; it then
compares the time per token of some steps of either kind, and keeps the faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deltatune.core.errors import DeltatuneError
from deltatune.train.recompute import Recompute

Speed = Literal["auto", "eager", "compile"]

WARM_UP = 60.0  # seconds; SmolLM2's blocks took less than 52 on two cores
WORTH = 40
SKIPPED, MEASURED = 2, 4  # steps: the first load and compile, the others tell


class Pace:
    """Told of each step, it compiles the blocks of `model` and takes that back."""

    def __init__(self, model: nn.Module, speed: Speed) -> None:
        self.blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.undecided = speed == "auto" and bool(self.blocks)
        self.times: list[float] = []  # seconds per token of the steps since the last change
        self.eager: float | None = None
        if speed == "compile":
            self._compile()

    def step(self, seconds: float, tokens: int, left: int, note: Callable[[str], None]) -> None:
        """After a step of so many tokens, with `left` steps to come. `note` is told what was decided, once it is."""
        if not self.undecided:
            return
        self.times.append(seconds / tokens)
        if len(self.times) < SKIPPED + MEASURED:
            return
        rate = statistics.median(self.times[SKIPPED:])
        if self.eager is None:
            self.undecided = rate * tokens * left >= WORTH * WARM_UP
            if self.undecided:
                self.eager, self.times = rate, []
                self._compile()
            return
        self.undecided = False
        if rate >= self.eager:
            self.restore()
        kept = "kept" if rate < self.eager else "dropped"
        note(f"compiled blocks run at {self.eager / rate:.2f} times the speed: {kept}")

    def _compile(self) -> None:
        if not self.blocks:
            raise DeltatuneError("train.speed: compile finds no blocks in this model; set it to eager")
        for block in self.blocks:
            block.compile(dynamic=True)

    def restore(self) -> None:
        for block in self.blocks:
            block._compiled_call_impl = None


@contextmanager
def paced(model: nn.Module, speed: Speed, recompute: Recompute = "none") -> Iterator[Pace]:
    """Inside, blocks may be compiled; afterwards they are as they were."""
    pace = Pace(model, speed if recompute == "none" else "eager")  # torch runs what it recomputes uncompiled
    try:
        yield pace
    finally:
        pace.restore()
