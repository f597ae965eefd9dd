"""Training low-rank deltas in stages: the engine of ReLoRA, PeriodicLoRA and ChainOfLoRA.

At the end of a stage every delta s B A in training hands `share` of itself to a constant of the adapter, and

    share < 1      A, B <- sqrt(1 - share) (A, B)        the product shrinks to the rest
    share = 1      A <- Kaiming-uniform,  B <- 0         it begins anew

so the function is the same before and after, whatever the share, and the rank of the whole change is not bounded by r.
The papers write into W; here it stays as it is, and the constant, fp32 like the factors, is saved, merged and resumed
with the adapter. It consists of factors of rank N r after N stages, N r (in + out) numbers, until that is more than
min(in, out), and of the dense sum beside an identity from then on. The last stage's delta stays in the factors.

A stage's draws depend on `seed` and its step alone, so ranks agree and a resumed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltatune.core import DeltatuneError, Events, Run

KEEPS = "keeps what was trained as a constant"
Moments = Callable[[Tensor, torch.Generator], Tensor]  # an optimizer's moment -> what the next stage begins with


def at_random(share: float) -> Moments:
    """Zero that share of the elements, drawn at random."""
    return lambda t, generator: t * (torch.rand(t.shape, generator=generator) >= share).to(t.device)


def by_magnitude(share: float) -> Moments:
    """Zero that share of the elements, the smallest; ties with the largest of these go too."""

    def pruned(t: Tensor, generator: torch.Generator) -> Tensor:
        size = t.abs()
        return t * (size > size.flatten().kthvalue(max(1, math.ceil(share * t.numel()))).values)

    return pruned


class Stages(Events):
    """`ends(step)`: whether a stage ends with that step. `moments`: what becomes of the optimizer's state of the
    factors; None forgets it, its step count included. `rate(step)`: what the learning rates are multiplied by, in place
    of the run's schedule. `rank(step)`: of the stage that follows, 0 for the first; beyond it A and B stay zero."""

    def __init__(self, name: str, run: Run, ends: Callable[[int], bool], *, share: float = 1.0, seed: int = 0,
                 moments: Moments | None = None, rate: Callable[[int], float] | None = None,
                 rank: Callable[[int], int] | None = None) -> None:  # fmt: skip
        units = () if run.adapter is None else run.adapter.units()
        self.deltas: list[Any] = [m for _, u in units for m in u.modules() if hasattr(m, "unload")]
        if not self.deltas:
            raise DeltatuneError(f"{name}: nothing in training can be kept as a constant; use it with LoRA")
        if len({p for d in self.deltas for p in (d.a, d.b)}) < 2 * len(self.deltas):
            raise DeltatuneError(f"{name}: several sites share their factors, which cannot begin anew at one of them")
        if not any(map(ends, range(1, run.steps))):
            raise DeltatuneError(f"{name}: no stage of this run of {run.steps} steps ends before it does; make them"
                                 " shorter, or train longer")  # fmt: skip
        run.claim(KEEPS, name)
        self.ends, self.share, self.seed = ends, share, seed
        self.moments, self.rate, self.rank = moments, rate, rank

    @torch.no_grad()
    def on_train_start(self, run: Run) -> None:
        if self.rank is not None and run.step == 0:
            for delta in self.deltas:
                delta.a[self.rank(0) :] = 0

    def on_grads(self, run: Run) -> None:
        if self.rate is not None and run.optimizer is not None:
            factor = self.rate(run.step)
            for group in run.optimizer.param_groups:
                group["lr"] = group.get("initial_lr", run.optimizer.defaults["lr"]) * factor

    @torch.no_grad()
    def on_step_end(self, run: Run) -> None:
        if not self.ends(run.step) or run.step >= run.steps:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + run.step)
        for delta in self.deltas:
            delta.unload(self.share)
            if self.share == 1:  # Kaiming-uniform with a = sqrt(5), as at the start
                fresh = torch.rand(delta.a.shape, generator=generator, dtype=torch.float64) * 2 - 1
                if self.rank is not None:
                    fresh[self.rank(run.step) :] = 0
                delta.a.copy_(fresh / math.sqrt(delta.a.shape[1]))
            for p in (delta.a, delta.b):
                self._forget(run, p, generator)

    def _forget(self, run: Run, p: Tensor, generator: torch.Generator) -> None:
        state = {} if run.optimizer is None else run.optimizer.state
        if self.moments is None:
            state.pop(p, None)
            return
        for _, value in sorted(state.get(p, {}).items()):  # in one order, also after a resume
            if isinstance(value, Tensor) and value.shape == p.shape:
                value.copy_(self.moments(value, generator))
