"""SparseAdapter's masks: scores of the projections before the first step, and the best, which stay. He et al., Findings
of EMNLP 2022. arXiv:2210.04284"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from deltatune.callbacks.selection import Units, at_rest, best
from deltatune.core import Delta, DeltatuneError, Events, Run

Score = Literal["random", "magnitude", "snip", "grasp", "synflow"]
REACH = 1e-2  # of a central difference, relative to the norm of all weights


class Prune(Events):
    """`method` has the options. An adapter that has its masks, a loaded one say, keeps them."""

    def __init__(self, method: Any, units: Units) -> None:
        self.method, self.units, self.told = method, units, f"SparseAdapter: score={method.score!r}"
        self.pairs = [tuple(u._parameters[n] for n in u.names) for u in units]  # down (m, in), up (out, m)
        self.weights = [w for pair in self.pairs for w in pair]

    @torch.no_grad()
    def on_train_start(self, run: Run) -> None:
        if run.step or all(bool(u.chosen) for u in self.units):
            return
        if self.method.score != "random" and not all(bool(w.any()) for w in self.weights):
            raise DeltatuneError(f"{self.told}: where a projection is zero there is nothing to compare; give std")
        scores = [z.flatten() for z in getattr(self, self.method.score)(run)]
        if not all(bool(z.isfinite().all()) for z in scores):
            raise DeltatuneError(f"{self.told}: the scores are not finite; train in a wider precision")
        if not (k := int(self.method.density * sum(map(len, scores)))):
            raise DeltatuneError(f"SparseAdapter: density={self.method.density} keeps no weight; raise it")
        kept = iter(best(scores, k))
        for unit, pair in zip(self.units, self.pairs, strict=True):
            masks = [unit.get_buffer(f"{n}_mask") for n in unit.names]
            for w, mask in zip(pair, masks, strict=True):
                mask.fill_(False).view(-1)[next(kept)] = True
                w.mul_(mask)
            if isinstance(unit, Delta) and not all(bool(m.any()) for m in masks):
                for w in pair:  # their product is zero and has no gradient
                    w.requires_grad_(False)
            unit.chosen.fill_(True)

    def random(self, run: Run) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.method.seed)
        return [torch.rand(w.shape, generator=generator).to(w.device) for w in self.weights]

    def magnitude(self, run: Run) -> list[Tensor]:
        return [w.abs() for w in self.weights]

    def snip(self, run: Run) -> list[Tensor]:
        return [(g * w).abs() for g, w in zip(self.gradients(run), self.weights, strict=True)]

    def synflow(self, run: Run) -> list[Tensor]:
        flows = [(down.abs(), up.abs()) for down, up in self.pairs]
        return [z for down, up in flows for z in (down * up.sum(0)[:, None], up * down.sum(1))]

    def grasp(self, run: Run) -> list[Tensor]:
        before, g = [w.clone() for w in self.weights], self.gradients(run)
        step = REACH * float(_norm(before) / _norm(g))
        ends = []
        for sign in (1, -1):
            for w, old, d in zip(self.weights, before, g, strict=True):
                w.copy_(old + sign * step * d)
            ends.append(self.gradients(run))
        for w, old in zip(self.weights, before, strict=True):
            w.copy_(old)
        return [w * (a - b) / (2 * step) for w, a, b in zip(before, *ends, strict=True)]

    def gradients(self, run: Run) -> list[Tensor]:
        """dL/dw, summed over the batches."""
        if run.losses is None:
            raise DeltatuneError(
                f"{self.told} needs training data, and this loop offers none (Run.losses is None); train with "
                "deltatune, or take random, magnitude or synflow"
            )
        total = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in self.weights]
        with at_rest(run.model), torch.enable_grad():
            for loss in run.losses(self.method.batches):
                found = torch.autograd.grad(loss, self.weights, materialize_grads=True)
                for t, g in zip(total, found, strict=True):
                    t += g
        return total


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
