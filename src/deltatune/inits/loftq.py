"""LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models. Li et al., ICLR 2024. arXiv:2310.08659

    Q_t = q(W - s B_{t-1} A_{t-1}),    s B_t A_t = SVD_r(W - Q_t),    B_0 A_0 = 0          (alg. 1)

W (out, in) is the weight before quantisation, read again from the files that the base was loaded from; q is the base's
own quantisation, whatever it is. Q_1 = q(W) is the base as loaded, so that one iteration leaves it alone. More of them
replace it for as long as the adapter is attached: without the adapter in effect it is Q_t, and detaching it brings Q_1
back. The error |W - Q_t - s B_t A_t| may rise again, with 2 bits above all, so the best of the T iterations is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core import DeltatuneError, Init, Site
from deltatune.inits.pissa import leading


@dataclass(frozen=True, kw_only=True)
class LoftQ(Init):
    """`iterations`: T. `niter`: iterations of a randomised decomposition in place of the exact one, as `PiSSA` has it.
    `source`: folder or hub name of W, where it is not the one that the base was loaded from."""

    iterations: int = 1
    niter: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise DeltatuneError(f"LoftQ: iterations must be at least 1, got {self.iterations}")

    @torch.no_grad()
    def start(self, delta: Any, site: Site) -> None:
        if (w := original(self, site, self.source)) is not None:
            fill(delta, *alternate(self, delta, site, w, self.iterations, self.niter))


def original(init: Init, site: Site, source: str | None) -> Tensor | None:
    """W, (out, in) in fp32 or wider; None where only shapes are asked for."""
    if site.device.type == "meta":
        return None
    if not site.quantised:
        raise DeltatuneError(
            f"{type(init).__name__}: {site.path} is not quantised; load the base with quantize: nf4, or use PiSSA"
        )
    w = site.original(source)
    return w.to(torch.promote_types(w.dtype, torch.float32))


def alternate(init: Init, delta: Any, site: Site, w: Tensor, iterations: int, niter: int | None,
              begin: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The (B, A) of the least error, whose Q is left in the base. `begin`: B_0 and A_0, where they are not zero."""
    target, least = w, float("inf")
    if begin is not None:
        target = w - delta.s * begin[0] @ begin[1]
    for t in range(iterations):
        if t or begin is not None:
            site.write(target)
        gap = w - site.weight.to(w.dtype)
        b, a = leading(init, delta, gap, niter)
        error = float(torch.linalg.matrix_norm(gap - delta.s * b @ a))
        if error < least:
            least, best, its_target = error, (b, a), target
        last, target = target, w - delta.s * b @ a
    if its_target is not last:
        site.write(its_target)
    return best


@torch.no_grad()
def fill(delta: Any, b: Tensor, a: Tensor) -> None:
    delta.b.copy_(b)
    delta.a.copy_(a)
