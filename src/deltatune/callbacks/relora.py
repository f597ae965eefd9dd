"""ReLoRA: High-Rank Training Through Low-Rank Updates. Lialin et al., ICLR 2024. arXiv:2307.05695

    every c steps:   W <- W + s B A,  A <- Kaiming-uniform,  B <- 0                                          (sec. 3)
                     a share `prune` of the moments of A and B <- 0, the smallest
    rate(t) = t / w                                       t < w
              k / v  g(c floor(t / c) + v)                k = t mod c < v, t >= c: a restart
              g(t)                                        else
    g(t) = m + (1 - m) (1 + cos(pi (t - w) / (T - w))) / 2                                       "jagged cosine"

t counts the optimizer's steps from 1 to T. The rate is 0 at the step that a cycle ends with, so that the factors begin
anew where nothing moves. It takes the place of the run's schedule and warm-up. W is not written: see `periodic`. Train
norms, embeddings and the head beside the factors by a union with `Tune`, and begin, as the authors do for pre-training,
from a base that full-rank training has warmed up. They give 0.9 with `prune_by="magnitude"` or 0.999 "random" too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deltatune.callbacks.periodic import Stages, at_random, by_magnitude
from deltatune.core import Callback, DeltatuneError, Run


@dataclass(frozen=True, kw_only=True)
class ReLoRA(Callback):
    """`every` c, `warmup` w and `restart` v in steps; `floor` m, the least share of the learning rate."""

    every: int = 1000
    warmup: int = 100
    restart: int = 50
    floor: float = 0.1
    prune: float = 0.99
    prune_by: Literal["magnitude", "random"] = "magnitude"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1 <= self.warmup <= self.every and 1 <= self.restart <= self.every):
            now = f"every={self.every}, warmup={self.warmup}, restart={self.restart}"
            raise DeltatuneError(f"ReLoRA: {now}: warmup and restart must lie between 1 and every")
        if not (0 <= self.floor <= 1 and 0 < self.prune <= 1):
            raise DeltatuneError(f"ReLoRA: floor={self.floor} must lie in [0, 1] and prune={self.prune} in (0, 1]")
        if self.prune_by not in ("magnitude", "random"):
            raise DeltatuneError(f"ReLoRA: prune_by is 'magnitude' or 'random', got {self.prune_by!r}")

    def rate(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at `step` of `steps`."""
        if step < self.warmup:
            return step / self.warmup
        k = step % self.every
        if self.every <= step < steps and k < self.restart:
            return k / self.restart * self._cosine(step - k + self.restart, steps)
        return self._cosine(step, steps)

    def _cosine(self, step: int, steps: int) -> float:
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2

    def start(self, run: Run) -> Stages:
        prune = by_magnitude if self.prune_by == "magnitude" else at_random
        return Stages("ReLoRA", run, lambda step: step % self.every == 0, seed=self.seed,
                      moments=prune(self.prune), rate=lambda step: self.rate(step, run.steps))  # fmt: skip
