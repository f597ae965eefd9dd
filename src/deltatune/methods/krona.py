"""KronA: Parameter Efficient Tuning with Kronecker Adapter. Edalati et al., 2022. arXiv:2212.10650

    W' = W + s A (x) C,    A in R^{a1 x a2},  C in R^{c1 x c2},  a1 c1 = out,  a2 c2 = in

(x) is the Kronecker product: block (i, j) of it is A_ij C. It is never formed for a linear layer, since with the input
laid out by rows as X in R^{a2 x c2} its product with A (x) C is A X C' in R^{a1 x c1}. Unlike a low-rank change it can
have full rank: rank A (x) C = rank A rank C. A is Kaiming-uniform and C zero, so W' = W at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site


@dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """`a`: (a1, a2), the shape of A; by default the largest divisors of out and in up to their square roots, which
    leaves near the fewest parameters that any shape does."""

    lr: ClassVar[float] = 1e-2
    a: tuple[int, int] | None = None
    s: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a is not None and (len(self.a) != 2 or min(self.a) < 1):
            raise DeltatuneError(f"KronA: a is two whole numbers of at least 1, the shape of A, got {self.a}")

    def build(self, site: Site, shared: nn.Module | None) -> Kronecker:
        out, in_ = site.shape.out, site.shape.in_
        a1, a2 = self.a or (split(out)[0], split(in_)[0])
        if out % a1 or in_ % a2:
            raise DeltatuneError(
                f"KronA: {site.path!r}: a={(a1, a2)} does not divide the weight ({out}, {in_}); give divisors, or None"
            )
        return Kronecker(site, (a1, a2), (out // a1, in_ // a2), self.s)


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product of two, the smaller first: `factor` and the rest where it divides n, else as near to each other
    as can be, the smaller not above `factor` where that is positive."""
    if factor > 0 and n % factor == 0:
        small = min(factor, n // factor)
    else:
        most = math.isqrt(n) if factor < 1 else min(factor, math.isqrt(n))
        small = next(d for d in range(most, 0, -1) if n % d == 0)
    return small, n // small


def kron_linear(x: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """`F.linear(x, torch.kron(L, R))` for L and R the products of the matrices in `left` and in `right`."""
    x = x.unflatten(-1, (left[-1].shape[1], right[-1].shape[1]))
    for r in reversed(right):
        x = F.linear(x, r)
    x = x.transpose(-1, -2)
    for l in reversed(left):
        x = F.linear(x, l)
    return x.transpose(-1, -2).flatten(-2)


class Kronecker(Delta):
    """`a` (a1, a2), `c` (c1, c2)."""

    def __init__(self, site: Site, a: tuple[int, int], c: tuple[int, int], s: float) -> None:
        super().__init__()
        self.s = s
        self.a = nn.Parameter(torch.empty(*a, **site.like))
        self.c = nn.Parameter(torch.zeros(*c, **site.like))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def weight(self, w: Tensor) -> Tensor:
        return w + torch.kron(self.s * self.a, self.c)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        y = call(x)
        return y + kron_linear(x.to(self.a.dtype), [self.s * self.a], [self.c]).to(y.dtype)
