"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang, Yu and Li, NeurIPS 2024. arXiv:2407.05000

    dL/dW = U S V',    A = c V'_{1..r},    B = c U_{r+1..2r},    c = out^1/4 / gamma^1/2        (alg. 1)

so that the first step on A and B moves W' by -lr s^2 (B B' dL/dW + dL/dW A' A) = -lr s^2 c^2 G_2r, along the best
approximation of rank 2r of full fine-tuning's step (theorem 3.1). The gradient is that of the mean over `batches`.
The authors use alpha/sqrt(r) with alpha = gamma = 16; with it, c is stable in out, in and r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from deltatune.core import DataInit, DeltatuneError, Waiting
from deltatune.core.start import Losses, gradients

_MORE = 8  # directions that the randomised decomposition looks at beyond 2r (Halko et al. 2011, sec. 1.3)


@dataclass(frozen=True, kw_only=True)
class LoRAGA(DataInit):
    """`niter`: None for the exact decomposition, else the iterations of a randomised one."""

    gamma: float = 16.0
    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise DeltatuneError(f"LoRAGA: gamma must be positive, got {self.gamma}")

    def fill(self, sites: Sequence[Waiting], model: nn.Module, losses: Losses) -> None:
        left = dict.fromkeys(sites)
        for module, g in gradients(model, [s.module for s in sites], partial(losses, self.batches)):
            for site in [s for s in left if s.module is module]:
                site.delta.start_from(*self.factors(site, site.own(g)))
                del left[site]
        if left:
            raise DeltatuneError(
                f"LoRAGA: no gradient reached {next(iter(left)).path!r}: the loss does not depend on it, or the "
                "adapter is not active; leave it out of targets"
            )

    @torch.no_grad()
    def factors(self, site: Waiting, g: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) for a gradient (out, in)."""
        r, full = len(site.delta.a), min(g.shape)
        if 2 * r > full:
            raise DeltatuneError(f"LoRAGA: {site.path!r}: r={r}, weight {tuple(g.shape)}: give r <= {full // 2}")
        if self.niter is None:
            u, _, vt = torch.linalg.svd(g, full_matrices=False)
        else:
            u, _, v = torch.svd_lowrank(g, q=min(2 * r + _MORE, full), niter=self.niter)
            vt = v.T
        c = len(g) ** 0.25 / self.gamma**0.5
        return c * u[:, r : 2 * r], c * vt[:r]
