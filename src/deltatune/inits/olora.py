"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Büyükakyüz 2024. arXiv:2406.01775

    W = Q R,    B = Q[:, :r],   A = R[:r, :]                                               (alg. 1)

B starts orthonormal and is not kept so. The residual W - s B A is kept as a difference and not written into the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core import DeltatuneError, Init


@dataclass(frozen=True, kw_only=True)
class OLoRA(Init):
    @torch.no_grad()
    def __call__(self, delta: Any, w: Tensor) -> None:
        """w: (out, in). Raises DeltatuneError when r exceeds its smaller side."""
        r, full = len(delta.a), min(w.shape)
        if r > full:
            raise DeltatuneError(f"OLoRA: r={r}, weight {tuple(w.shape)}: give r <= {full}")
        q, upper = torch.linalg.qr(w.to(torch.promote_types(w.dtype, torch.float32)))
        delta.start_from(q[:, :r], upper[:r])
