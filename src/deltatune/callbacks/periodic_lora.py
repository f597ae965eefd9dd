"""PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization. Meng et al., 2024. arXiv:2402.16141

    every k steps:   W <- W + m s B A,   A <- sqrt(1 - m) A,   B <- sqrt(1 - m) B         momentum unloading, 0 < m < 1
                     W <- W + s B A,     A <- Kaiming-uniform, B <- 0                     plain unloading, m = 1

m s B A + s (sqrt(1-m) B) (sqrt(1-m) A) = s B A: the function is the same before and after. 0.999 of the optimizer's
moments of A and B are zeroed at random; plain unloading begins them anew. W is not written: see `periodic`. The authors
train with a constant learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.callbacks.periodic import Stages, at_random
from deltatune.core import Callback, DeltatuneError, Run

PRUNED = 0.999


@dataclass(frozen=True, kw_only=True)
class PeriodicLoRA(Callback):
    """`every` k, the steps of a stage; `m`, the share that is unloaded at its end."""

    every: int = 250
    m: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or not 0 < self.m <= 1:
            raise DeltatuneError(f"PeriodicLoRA: every={self.every}, m={self.m}: give every >= 1 and 0 < m <= 1")

    def start(self, run: Run) -> Stages:
        moments = at_random(PRUNED) if self.m < 1 else None
        return Stages("PeriodicLoRA", run, lambda step: step % self.every == 0, share=self.m, seed=self.seed,
                      moments=moments)  # fmt: skip
