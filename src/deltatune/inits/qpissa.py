"""QPiSSA: PiSSA on a quantised base. Meng et al., NeurIPS 2024. arXiv:2404.02948, sec. 4

    s B A = SVD_r(W),    Q = q(W - s B A),    y = (Q + s B A) x

The residual has a narrower spectrum than W, so its quantisation errs less. W is the weight before quantisation, read
again from the files that the base was loaded from; Q takes the base's place for as long as the adapter is attached.
Then `iterations` of LoftQ's alternation, 5 in the paper, may fit the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deltatune.core import DeltatuneError, Init, Site
from deltatune.inits.loftq import alternate, fill, original
from deltatune.inits.pissa import leading


@dataclass(frozen=True, kw_only=True)
class QPiSSA(Init):
    """`niter` as in `PiSSA`. `source`: folder or hub name of W, if it is not the one the base was loaded from."""

    iterations: int = 0
    niter: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise DeltatuneError(f"QPiSSA: iterations must not be negative, got {self.iterations}")

    @torch.no_grad()
    def start(self, delta: Any, site: Site) -> None:
        if (w := original(self, site, self.source)) is None:
            return
        b, a = leading(self, delta, w, self.niter)
        if self.iterations:
            b, a = alternate(self, delta, site, w, self.iterations, self.niter, (b, a))
        else:
            site.write(w - delta.s * b @ a)
        fill(delta, b, a)
