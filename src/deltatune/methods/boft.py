"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al., ICLR 2024. arXiv:2311.06243

    W' = W R^T,    R = F_{m-1} ... F_1 F_0,    F_i = P_i^T diag(C_1, ..., C_{in/b}) P_i

Each C is a Cayley block of size b, as in OFT, which is BOFT with m = 1. P_i cuts the inputs into spans of b 2^i, and
each span into pieces of b / 2: a block holds piece j of a span's first half and piece j of its second. So every factor
doubles the inputs that an output of R depends on, and R is dense from m = log2(2 in / b) on. Q is zero, hence W' = W,
at the start. The bias is not touched.

Multiplicative dropout: in training, each factor is chosen with probability p1, and each of its blocks is then replaced
by the identity with probability p2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Method, Site
from deltatune.methods.oft import Rotation, blockwise


@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """`m`: the number of butterfly factors. With a "learned" magnitude, W' = diag(d) W R^T, where d starts at one."""

    lr: ClassVar[float] = 2e-3
    block_size: int = 8
    m: int = 2
    p1: float = 1.0
    p2: float = 0.0
    magnitude: Literal["kept", "learned"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2 or self.block_size % 2:
            raise DeltatuneError(f"BOFT: block_size must be even, got {self.block_size}")
        if self.m < 1:
            raise DeltatuneError(f"BOFT: m, the number of butterfly factors, must be at least 1, got {self.m}")
        if not (0 <= self.p1 <= 1 and 0 <= self.p2 < 1):
            raise DeltatuneError(f"BOFT: p1 must lie in [0, 1] and p2 in [0, 1), got {self.p1} and {self.p2}")
        if self.magnitude not in ("kept", "learned"):
            raise DeltatuneError(f"BOFT: magnitude is 'kept' or 'learned', got {self.magnitude!r}")

    def build(self, site: Site, shared: nn.Module | None) -> Butterfly:
        in_, b, m = site.shape.in_, self.block_size, self.m
        if in_ % (b << m - 1):
            fit = [n for n in range(m - 1, 0, -1) if in_ % (b << n - 1) == 0]
            advice = f"give m={fit[0]}" if fit else "give another block_size, or leave it out of the targets"
            spans = f"block_size 2^(m-1) = {b << m - 1} for block_size={b}, m={m}"
            raise DeltatuneError(f"BOFT: {site.path!r} has {in_} inputs, no multiple of {spans}; {advice}")
        return Butterfly(site, (m, in_ // b), b, self.magnitude, self.p1, self.p2)


class Butterfly(Rotation):
    """`q` (m, in / b, b (b - 1) / 2)."""

    def __init__(self, site: Site, shape: tuple[int, ...], size: int, magnitude: str, p1: float, p2: float) -> None:
        super().__init__(site, shape, size, magnitude)
        self.p1, self.p2 = p1, p2

    def turn(self, x: Tensor, r: Tensor) -> Tensor:
        r = self.dropped(r)
        for i in reversed(range(len(r))):
            x = _factor(x, r[i], i)
        return x

    def turn_back(self, x: Tensor, r: Tensor) -> Tensor:
        for i, c in enumerate(r):
            x = _factor(x, c.mT, i)
        return x

    def dropped(self, r: Tensor) -> Tensor:
        if not (self.training and self.p1 and self.p2):
            return r
        m, blocks = r.shape[:2]
        factor = torch.rand(m, 1, device=r.device) < self.p1
        block = torch.rand(m, blocks, device=r.device) < self.p2
        return torch.where((factor & block)[..., None, None], torch.eye(self.size).to(r), r)


def _factor(x: Tensor, c: Tensor, i: int) -> Tensor:
    """x F_i, (..., in), for the blocks c (in / b, b, b)."""
    half = c.shape[-1] // 2
    paired = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2)  # (..., span, j, which half, entry)
    h = blockwise(paired.flatten(-4), c)
    return h.unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4)
