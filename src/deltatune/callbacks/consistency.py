"""Consistency of two forward passes: AdaMix. Wang et al., EMNLP 2022. arXiv:2205.12410

    L = CE(p_1) + (weight / 2) (KL(p_2 || p_1) + KL(p_1 || p_2))         p_1, p_2 of two passes with draws of their own

The first of each pair is a target, without gradient. The mean is over the trained positions, as that of CE is. What is
drawn anew makes the passes differ: AdaMix's routes, and dropout. Each step costs twice a usual one, and its logits are
kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deltatune.core import Callback, DeltatuneError, Events, Run


@dataclass(frozen=True, kw_only=True)
class Consistency(Callback):
    weight: float = 1.0

    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise DeltatuneError(f"Consistency: weight must not be negative, got {self.weight}")

    def start(self, run: Run) -> _Consistent:
        return _Consistent(self.weight)


class _Consistent(Events):
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        if len(run.logits) < 2:
            raise DeltatuneError("Consistency compares two forward passes, and this training loop runs one: train with "
                                 "deltatune, or give Run.logits in your own loop")  # fmt: skip
        return loss + self.weight * run.share * divergence(*run.logits[:2]).to(loss.device)


def divergence(one: Tensor, two: Tensor) -> Tensor:
    """The mean over n of (KL(q || p) + KL(p || q)) / 2, p and q the softmax of logits (n, classes)."""
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    one, two = (F.kl_div(a, b.detach(), reduction="sum", log_target=True) for a, b in ((p, q), (q, p)))
    return (one + two) / (2 * max(1, len(p)))
