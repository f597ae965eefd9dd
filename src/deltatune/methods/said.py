"""Intrinsic SAID: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning.
Aghajanyan et al., ACL 2021. arXiv:2012.13255

    W'_i = W_i + l_i P_i(v),    v in R^(d - m) one vector for all m sites,  l_i in R        (sec. 3)
    P_i(v) = H G Pi H B v / c                                                               Fastfood: Le et al., 2013

with the structure-aware scales l_i. v is padded with zeros to N, a power of two; B is diagonal with random signs, Pi a
random permutation, G diagonal and normal, H the Walsh-Hadamard matrix, all N x N; the first D = out * in entries of the
product are W's. c = (D sum G^2)^(1/2), so that P_i keeps the norm on average. v is zero and l_i one, so W' = W at the
start. What an adapter trains and stores is d numbers: the rest follows from `seed` and the sites' paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site
from deltatune.inits.seeded import normal, permutation, place, signs


@dataclass(frozen=True, kw_only=True)
class SAID(Method):
    """`d`: the number of trained values, one scale a site included. Sites are weights; the paper's are all tensors."""

    lr: ClassVar[float] = 3e-3
    d: int = 20_000
    seed: int = 0

    def shared(self, sites: Sequence[Site]) -> Subspace:
        if self.d <= len(sites):
            raise DeltatuneError(f"SAID: d={self.d} leaves nothing beside one scale for each of {len(sites)} sites")
        return Subspace(self.d - len(sites), dtype=sites[0].dtype, device=sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Projected:
        assert isinstance(shared, Subspace)
        return Projected(site, shared, f"said/{self.seed}/{place(site)}")


class Subspace(nn.Module):
    """`v` (d - m,), and the Walsh-Hadamard matrix of order 128, whose corners are those of lower orders."""

    h: Tensor

    def __init__(self, dim: int, **like: Any) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(dim, **like))
        h = torch.ones(1, 1, dtype=torch.promote_types(self.v.dtype, torch.float32), device=self.v.device)
        for _ in range(7):
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        self.register_buffer("h", h, persistent=False)


class Fastfood(nn.Module):
    """P: R^d -> R^size, linear, in O(N log N), with O(N) stored and nothing kept for the backward pass."""

    b: Tensor
    index: Tensor
    g: Tensor

    def __init__(self, dim: int, size: int, key: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.size, self.low = size, _power(dim)
        n = max(_power(size), self.low)
        g = normal(f"{key}/G", n, device).to(dtype)
        # the first H meets zeros beyond `low`, where it repeats itself: (H pad(v))_i = (H_low v)_(i mod low)
        index = permutation(f"{key}/Pi", n, device) % self.low
        self.register_buffer("b", signs(f"{key}/B", dim, device).to(dtype), persistent=False)
        self.register_buffer("index", index.int(), persistent=False)
        self.register_buffer("g", g / (size * g.square().sum()).sqrt(), persistent=False)

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        v, h = v.to(self.g), h.to(self.g)
        with torch.autocast("cpu" if v.is_meta else v.device.type, enabled=False):  # sums over N in full precision
            low = walsh_hadamard(F.pad(self.b * v, (0, self.low - len(v))), h)
            return walsh_hadamard(self.g * low.index_select(0, self.index), h)[: self.size]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def walsh_hadamard(x: Tensor, h: Tensor) -> Tensor:
    """H x of (N,), N a power of two: H is a Kronecker product of corners of `h`, and each acts on one axis of x."""
    left = len(x)
    while left > 1:
        k = min(left, len(h))
        x = (x.view(k, -1).T @ h[:k, :k]).reshape(-1)  # the first axis, transformed, becomes the last
        left //= k
    return x


class Projected(Delta):
    """`scale` (1,) is l; `subspace` holds v."""

    roles = {"scale": "scale"}

    def __init__(self, site: Site, subspace: Subspace, key: str) -> None:
        super().__init__()
        self.subspace, self.shape = subspace, site.weight.shape
        self.scale = nn.Parameter(torch.ones(1, **site.like))
        self.fastfood = Fastfood(len(subspace.v), self.shape.numel(), key, subspace.h.dtype, site.device)

    def delta(self) -> Tensor:
        return (self.scale * self.fastfood(self.subspace.v, self.subspace.h)).view(self.shape)

    def weight(self, w: Tensor) -> Tensor:
        return w + self.delta()

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        y, delta = call(x), self.delta()  # apart, for what is small would be lost in a W' of half precision
        return y + F.linear(x.to(delta.dtype), delta).to(y.dtype)
