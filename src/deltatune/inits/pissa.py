"""PiSSA: Principal Singular Values and Singular Vectors Adaptation. Meng et al., NeurIPS 2024. arXiv:2404.02948

    W = U S V',    B = U_r (S_r / s)^1/2,   A = (S_r / s)^1/2 V_r'                         (eq. 2-3)

so that s B A is the best rank-r approximation of W. The residual W - s B A is kept as a difference and not written
into the base, which stays what other adapters were trained on. On a quantised base W is the dequantised weight; an
adapter that lowers the error of quantisation is `QPiSSA`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core import DeltatuneError, Init

_MORE = 8  # directions that the randomised decomposition looks at beyond r (Halko et al. 2011, sec. 1.3)


@dataclass(frozen=True, kw_only=True)
class PiSSA(Init):
    """`niter`: None for the exact decomposition, else the iterations of a randomised one, 4 to 16 in the paper."""

    niter: int | None = None

    @torch.no_grad()
    def __call__(self, delta: Any, w: Tensor) -> None:
        """w: (out, in). Raises DeltatuneError when it has fewer than r singular values, or s is not positive."""
        delta.start_from(*leading(self, delta, w, self.niter))


def leading(init: Init, delta: Any, w: Tensor, niter: int | None) -> tuple[Tensor, Tensor]:
    """(B, A), so that s B A is the best rank-r approximation of w (out, in), for `init` of `delta`."""
    r, full = len(delta.a), min(w.shape)
    if r > full or delta.s <= 0:
        name = type(init).__name__
        raise DeltatuneError(f"{name}: r={r}, s={delta.s}, weight {tuple(w.shape)}: give r <= {full} and alpha > 0")
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if niter is None:
        u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        u, sigma, v = torch.svd_lowrank(w, q=min(r + _MORE, full), niter=niter)
        vt = v.T
    root = (sigma[:r] / delta.s).sqrt()
    return u[:, :r] * root, root[:, None] * vt[:r]
