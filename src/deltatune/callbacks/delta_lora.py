"""Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices. Zi et al., 2023. arXiv:2309.02411

    after step t > K:   W_t+1 = W_t + lambda s (B_t+1 A_t+1 - B_t A_t)                                     (eq. 5, 6)

The products telescope, so the base is W_T = W_0 + lambda s (B_T A_T - B_K A_K) with no trace of the path: that is kept
as a constant of the adapter, of rank 2 r, made anew after each step from the factors and those of step K, and W_0 stays
as it is. It has no gradient; A and B get that of s B A alone, as in the paper.

What this says of the rank: the whole change is s ((1 + lambda) B_T A_T - lambda B_K A_K), of rank 2 r at most, and of
rank r at most when K = 0, where it is LoRA with s (1 + lambda) in the forward pass and s in the gradient. The update of
W is as low in rank as its factors; the title's "high-rank" is the paper's, not what the equations give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.callbacks.periodic import KEEPS
from deltatune.core import Callback, DeltatuneError, Events, Run, Staged


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(Callback):
    """`ratio` lambda and `start_steps` K: 2 and 500 for E2E, 0.5 and 1000 for summarisation in the paper."""

    ratio: float = 2.0
    start_steps: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 0 or self.start_steps < 0:
            now = f"ratio={self.ratio}, start_steps={self.start_steps}"
            raise DeltatuneError(f"DeltaLoRA: {now}: give ratio > 0 and start_steps >= 0")

    def start(self, run: Run) -> _Moved:
        units = () if run.adapter is None else run.adapter.units()
        deltas = [m for _, u in units for m in u.modules() if isinstance(m, Staged)]
        if not deltas:
            raise DeltatuneError("DeltaLoRA: nothing in training can be kept as a constant; use it with LoRA")
        if p := max(float(getattr(getattr(d, "dropout", None), "p", 0.0)) for d in deltas):
            raise DeltatuneError(f"DeltaLoRA: dropout={p}: the gradients of W and of B A would differ; set it to 0")
        if self.start_steps >= run.steps:
            raise DeltatuneError(
                f"DeltaLoRA: start_steps={self.start_steps} leaves none of {run.steps} steps; lower it, or train longer"
            )
        run.claim(KEEPS, "DeltaLoRA")
        return _Moved(self, deltas)


class _Moved(Events):
    def __init__(self, options: DeltaLoRA, deltas: list[Staged]) -> None:
        self.ratio, self.first, self.deltas = options.ratio, options.start_steps, deltas

    def on_train_start(self, run: Run) -> None:
        if run.step == self.first == 0:
            self._begin()

    def on_step_end(self, run: Run) -> None:
        if run.step == self.first:
            self._begin()
        elif run.step > self.first:
            self._follow()

    def _product(self, delta: Staged) -> tuple[Tensor, Tensor]:
        up, down = delta.product()
        return self.ratio * up, down

    @torch.no_grad()
    def _begin(self) -> None:
        for delta in self.deltas:
            up, down = self._product(delta)
            delta.keep(torch.cat([up, -up], 1), torch.cat([down, down]))

    @torch.no_grad()
    def _follow(self) -> None:
        for delta in self.deltas:
            assert delta.constant is not None
            up, down = self._product(delta)
            r = len(down)
            delta.constant.up[:, -2 * r : -r] = up  # the last r columns are those of step K
            delta.constant.down[-2 * r : -r] = down
