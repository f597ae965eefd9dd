"""Random tensors that a key alone determines, the same on every device and in every version of torch, so that no file
has to hold them.

    u_n = mix(h(key) + n gamma)       SplitMix64: Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195
"""

from __future__ import annotations

import math
from hashlib import blake2b

import torch
from torch import Tensor

from deltatune.core import Site

_GAMMA, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def place(site: Site) -> str:
    """A site's own key: its path and, in a fused projection, its first row."""
    return f"{site.path}.{site.at}" + ("" if site.rows is None else f"[{int(site.rows[0])}]")


def _signed(bits: int) -> int:
    return bits - (bits >> 63 << 64)


def _bits(key: str, n: int, device: torch.device) -> Tensor:
    """(n,) int64: 64 random bits each; products wrap."""
    start = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)
    z = torch.arange(1, n + 1, device=device) * _signed(_GAMMA) + start
    for shift, factor in _MIX:
        z = (z ^ _down(z, shift)) * _signed(factor)
    return z ^ _down(z, 31)


def _down(z: Tensor, shift: int) -> Tensor:
    """`>>` of an unsigned number: int64 would bring its sign along."""
    return z >> shift & (1 << 64 - shift) - 1


def uniform(key: str, n: int, device: torch.device) -> Tensor:
    """(n,) fp32 in [0, 1), of 24 bits."""
    return _down(_bits(key, n, device), 40).float() * 2**-24


def normal(key: str, n: int, device: torch.device) -> Tensor:
    """(n,) fp32, by Box and Muller (1958)."""
    radius, angle = uniform(f"{key}/radius", n, device), uniform(f"{key}/angle", n, device)
    return (-2 * torch.log1p(-radius)).sqrt() * (2 * math.pi * angle).cos()


def signs(key: str, n: int, device: torch.device) -> Tensor:
    """(n,) fp32, each 1 or -1."""
    return 1 - 2 * (uniform(key, n, device) < 0.5).float()


def permutation(key: str, n: int, device: torch.device) -> Tensor:
    """(n,) int64: 0 to n - 1 in some order."""
    return _bits(key, n, device).argsort()
