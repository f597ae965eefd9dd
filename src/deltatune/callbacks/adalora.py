"""AdaLoRA's rank allocation. Zhang et al., ICLR 2023. arXiv:2303.10512

    I = |w dL/dw|     Ibar <- b1 Ibar + (1 - b1) I     U <- b2 U + (1 - b2) |I - Ibar|     s = Ibar U      (eq. 8-10)
    S_i = s(l_i) + mean_j s(P_ji) + mean_j s(Q_ij)                                                         (eq. 7)

After the optimizer's step t all triplets of the adapter are compared, and l_i of all but the b(t) best is zeroed, with

    b(t) = b_0                                                   t <= t_init
           int(b_T + (b_0 - b_T) (1 - (t - t_init) / (T - t_init - t_final))^3)     every `every` steps    (eq. 12)
           b_T                                                   t >= T - t_final, the choice of T - t_final for good

A zeroed l_i may grow back, and be chosen again, until then, so no earlier weights are kept as the best of a run. The
penalty is that of the authors' code, the mean over all P and Q of ||P' P - 1||_F and ||Q Q' - 1||_F, which the paper
sums and squares (eq. 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core import Callback, DeltatuneError, Events, Run

PARTS = ("a", "b", "e")  # Q (r, in), P (out, r), l (r, 1)


@dataclass(frozen=True, kw_only=True)
class RankAllocation(Callback):
    """`keep`: the share of the triplets that is left in the end. Steps are the optimizer's."""

    keep: float
    t_init: int = 0
    t_final: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_init < 0 or self.t_final < 0 or self.every < 1:
            now = f"t_init={self.t_init}, t_final={self.t_final}, every={self.every}"
            raise DeltatuneError(f"AdaLoRA: {now}: give at least 0, 0 and 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise DeltatuneError(f"AdaLoRA: beta1={self.beta1} and beta2={self.beta2} must lie in [0, 1)")

    def budget(self, step: int, steps: int, triplets: int) -> int:
        """b(t): how many of all the triplets a choice at `step` of `steps` leaves."""
        last = round(self.keep * triplets)
        if step <= self.t_init:
            return triplets
        if step >= steps - self.t_final:
            return last
        left = 1 - (step - self.t_init) / (steps - self.t_init - self.t_final)
        return int(last + (triplets - last) * left**3)

    def start(self, run: Run) -> _Allocation:
        if self.t_init + self.t_final >= run.steps:
            raise DeltatuneError(
                f"AdaLoRA: t_init={self.t_init} and t_final={self.t_final} leave no step of {run.steps} to prune in;"
                " lower them, or train longer"
            )
        run.keep_from = max(run.keep_from, run.steps - self.t_final)
        return _Allocation(self, run)


class _Allocation(Events):
    def __init__(self, options: RankAllocation, run: Run) -> None:
        self.options, self.unpenalised = options, True
        self.deltas = list(_deltas(run))
        tensors = {f"{path}.{n}": getattr(d, n) for path, d in self.deltas for n in PARTS}
        self.mean = {k: torch.zeros_like(p) for k, p in tensors.items()}  # Ibar
        self.spread = {k: torch.zeros_like(p) for k, p in tensors.items()}  # U

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        if not self.unpenalised:  # it depends on the parameters alone: once a step, whatever the micro-batches
            return loss
        self.unpenalised = False
        grams = [g for _, d in self.deltas for g in (d.a @ d.a.T, d.b.T @ d.b)]
        off = torch.stack([torch.linalg.matrix_norm(g - torch.eye(len(g)).to(g)).to(loss.device) for g in grams])
        return loss + self.options.orthogonality * off.mean()

    @torch.no_grad()
    def on_step_end(self, run: Run) -> None:
        o, step, self.unpenalised = self.options, run.step, True
        if step < run.steps - o.t_final:
            self._weigh()
            if step <= o.t_init or step % o.every:
                return
        score = self.scores()  # at rest from T - t_final on, and so is the choice
        best = score.sort(descending=True, stable=True).indices[: o.budget(step, run.steps, len(score))]
        chosen = torch.zeros_like(score, dtype=torch.bool).index_fill(0, best, True)
        for (_, d), mine in zip(self.deltas, chosen.split([len(d.e) for _, d in self.deltas]), strict=True):
            d.e.masked_fill_(~mine[:, None].to(d.e.device), 0)

    def _weigh(self) -> None:
        o = self.options
        for path, d in self.deltas:
            for n in PARTS:
                w, mean = getattr(d, n), self.mean[f"{path}.{n}"]
                now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
                mean.lerp_(now, 1 - o.beta1)
                self.spread[f"{path}.{n}"].lerp_((now - mean).abs(), 1 - o.beta2)

    def scores(self) -> Tensor:
        """(triplets,): S of every triplet, site by site."""
        found = []
        for path, _ in self.deltas:
            a, b, e = (self.mean[f"{path}.{n}"] * self.spread[f"{path}.{n}"] for n in PARTS)
            found.append((e[:, 0] + b.mean(0) + a.mean(1)).to(self.deltas[0][1].e.device))
        return torch.cat(found)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"mean.{k}": t for k, t in self.mean.items()} | {f"spread.{k}": t for k, t in self.spread.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if wrong := set(state) ^ set(own):
            raise DeltatuneError(f"AdaLoRA: the saved state is another adapter's: {sorted(wrong)[0]!r} is not in both")
        for k in own:
            own[k].copy_(state[k])


def _deltas(run: Run) -> Iterator[tuple[str, Any]]:
    """The triplets in the adapter's units, known by their tensors, wherever they are nested."""
    if run.adapter is not None:
        for name, unit in run.adapter.units():
            for path, module in unit.named_modules():
                if all(n in module._parameters for n in PARTS):
                    yield f"{name}.{path}".rstrip("."), module
