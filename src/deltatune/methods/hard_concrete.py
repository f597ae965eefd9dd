"""Hard concrete gates. Louizos et al., ICLR 2018. arXiv:1712.01312; without temperature, as in diff pruning.

u ~ U(0, 1),   s = sigmoid(log u - log(1 - u) + alpha),   z = clamp(s (r - l) + l, 0, 1),   l = -1.5, r = 1.5
P(z > t) = sigmoid(alpha - logit((t - l) / (r - l))),  0 <= t < 1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH = -1.5, 1.5
# Gauss-Legendre, (node, weight) on [0, 1]
_NODES = ((0.0469100770, 0.1184634425), (0.2307653449, 0.2393143352), (0.5, 0.2844444444), (0.7692346551, 0.2393143352),
          (0.9530899230, 0.1184634425))  # fmt: skip


def exceeds(alpha: Tensor, t: float) -> Tensor:
    """P(z > t)."""
    q = (t - LOW) / (HIGH - LOW)
    return torch.sigmoid(alpha - math.log(q / (1 - q)))


def mean(alpha: Tensor) -> Tensor:
    """E[z], which is the integral of P(z > t) over t in [0, 1]."""
    return torch.stack([weight * exceeds(alpha, t) for t, weight in _NODES]).sum(0)


def sampled(alpha: Tensor) -> Tensor:
    """z, one independent draw each, with a gradient where it lies between 0 and 1."""
    s = torch.sigmoid(torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4).logit() + alpha)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)
