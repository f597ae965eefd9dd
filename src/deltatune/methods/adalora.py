"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., ICLR 2023. arXiv:2303.10512

    W' = W + s P diag(l) Q,    P in R^{out x r},  l in R^r,  Q in R^{r x in}               (eq. 3)

P and Q are kept near orthogonal by a penalty, so that a triplet (P_i, l_i, Q_i) can be dropped by l_i = 0; which ones
is decided by `callbacks.adalora`. s = alpha / (init_r + 1e-5), the authors' code's, whatever is left of the rank.
P and Q are normal of deviation 0.02 and l is zero, so W' = W at the start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.callbacks.adalora import RankAllocation
from deltatune.core import Base, Callback, Delta, DeltatuneError, Method, Site

STD = 0.02  # of P and Q at the start


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """A site starts with `init_r` triplets and ends with `target_r` on average; for the rest see `RankAllocation`."""

    lr: ClassVar[float] = 5e-3
    target_r: int = 8
    init_r: int = 12
    t_init: int = 0
    t_final: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    alpha: float = 32.0
    orthogonality: float = 0.5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.target_r <= self.init_r:
            raise DeltatuneError(f"AdaLoRA: target_r must lie between 1 and init_r={self.init_r}, got {self.target_r}")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"AdaLoRA: dropout must lie in [0, 1), got {self.dropout}")
        self._allocation()

    def _allocation(self) -> RankAllocation:
        return RankAllocation(
            keep=self.target_r / self.init_r, t_init=self.t_init, t_final=self.t_final, every=self.every,
            beta1=self.beta1, beta2=self.beta2, orthogonality=self.orthogonality)  # fmt: skip

    def build(self, site: Site, shared: nn.Module | None) -> Triplets:
        return Triplets(site, self.init_r, self.alpha / (self.init_r + 1e-5), self.dropout)

    def callbacks(self) -> Iterable[Callback]:
        return [self._allocation()]


class Triplets(Delta):
    """`a` = Q (r, in), `b` = P (out, r), `e` = l (r, 1): what the authors and PEFT call lora_A, lora_B, lora_E."""

    roles = {"a": "down", "b": "up", "e": "scale"}

    def __init__(self, site: Site, r: int, s: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.a = nn.Parameter(torch.empty(r, site.shape.in_, **site.like).normal_(std=STD))
        self.b = nn.Parameter(torch.empty(site.shape.out, r, **site.like).normal_(std=STD))
        self.e = nn.Parameter(torch.zeros(r, 1, **site.like))
        self.dropout = nn.Dropout(dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.s * self.b, self.e * self.a

    def weight(self, w: Tensor) -> Tensor:
        up, down = self.factors()
        return w + up @ down

    def forward(self, call: Base, x: Any) -> Any:
        up, down = self.factors()
        y = call.plus(x, up, down, dropout=self.dropout.p if self.training else 0.0)
        return super().forward(call, x) if y is None else y
