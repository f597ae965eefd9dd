"""Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning. Xia et al., 2024. arXiv:2401.04151

    W' = W + s sum_j B_j A_j,      j = 1 ... M links, trained one after the other                            (sec. 3)

A link is a LoRA, trained for an M-th of the run; then a knot is tied: its product joins the constant, A begins anew at
random, B at zero, and the optimizer knows nothing of the link before. W is not written: see `periodic`. In the rank
step-down of the paper later links are narrower: `ranks=(8, 2)`, one for each link, none above LoRA's own r. `schedule`
says whether the learning rate follows the run's schedule over all links, or falls along a line to zero in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deltatune.callbacks.periodic import Stages
from deltatune.core import Callback, DeltatuneError, Run


@dataclass(frozen=True, kw_only=True)
class ChainOfLoRA(Callback):
    links: int = 2
    ranks: tuple[int, ...] = ()
    schedule: Literal["run", "link"] = "run"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.links < 2:
            raise DeltatuneError(f"ChainOfLoRA: links must be at least 2, got {self.links}; one link is LoRA alone")
        if self.ranks and (len(self.ranks) != self.links or min(self.ranks) < 1):
            raise DeltatuneError(f"ChainOfLoRA: ranks={self.ranks} must be {self.links} numbers >= 1, one a link")
        if self.schedule not in ("run", "link"):
            raise DeltatuneError(f"ChainOfLoRA: schedule is 'run' or 'link', got {self.schedule!r}")

    def knots(self, steps: int) -> list[int]:
        """The last step of every link."""
        return [round(j * steps / self.links) for j in range(1, self.links + 1)]

    def rate(self, step: int, steps: int) -> float:
        """1 at the first step of a link; the step after its last would have 0."""
        ends = [0, *self.knots(steps)]
        before, end = next(pair for pair in zip(ends, ends[1:], strict=False) if step <= pair[1])
        return (end - step + 1) / (end - before)

    def start(self, run: Run) -> Stages:
        if run.steps < self.links:
            raise DeltatuneError(f"ChainOfLoRA: {run.steps} steps cannot be shared by {self.links} links; train longer")
        ends = [0, *self.knots(run.steps)]
        rank = (lambda step: self.ranks[ends.index(step)]) if self.ranks else None
        rate = (lambda step: self.rate(step, run.steps)) if self.schedule == "link" else None
        stages = Stages("ChainOfLoRA", run, lambda step: step in ends[1:-1], seed=self.seed, rate=rate, rank=rank)
        if self.ranks and max(self.ranks) > (r := min(len(d.a) for d in stages.deltas)):
            raise DeltatuneError(f"ChainOfLoRA: ranks={self.ranks}: the adapter has rank {r}; attach one of a higher r")
        return stages
