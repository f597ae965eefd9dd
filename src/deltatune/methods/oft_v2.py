"""OFTv2: Orthogonal Finetuning Made Scalable. Qiu et al., 2025. arXiv:2506.19847

    y = W (R^T x) + b,    R = diag(R_1, ..., R_g),    R_i = (I + Q_i) (I + Q_i + Q_i^2 + ... + Q_i^k)

The input is rotated and the weight is never formed, so the base may be quantised (QOFT). Cayley's inverse is replaced
by its Neumann series (Cayley-Neumann), which needs ||Q_i|| < 1 and stops at k:

    R_i = R_Cayley (I - Q_i^{k+1})

so R_i^T R_i - I is O(||Q_i||^{k+1}) for odd k, and O(||Q_i||^{2k+2}) for even k, where the leading term is skew and
cancels. Hence k is even here unless you ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Site
from deltatune.methods.oft import OFT, Rotation


@dataclass(frozen=True, kw_only=True)
class OFTv2(OFT):
    """`k`: the last power in the Neumann series."""

    lr: ClassVar[float] = 2e-3
    k: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise DeltatuneError(f"OFTv2: k must be at least 1, got {self.k}")

    def build(self, site: Site, shared: nn.Module | None) -> CayleyNeumann:
        return CayleyNeumann(site, (self.count(site),), self.block_size, self.magnitude, self.k)


class CayleyNeumann(Rotation):
    def __init__(self, site: Site, shape: tuple[int, ...], size: int, magnitude: str, k: int) -> None:
        super().__init__(site, shape, size, magnitude)
        self.k = k

    def orthogonal(self, q: Tensor) -> Tensor:
        eye = torch.eye(self.size, dtype=q.dtype, device=q.device)
        series = eye + q
        for _ in range(self.k - 1):
            series = eye + q @ series
        return series + q @ series
