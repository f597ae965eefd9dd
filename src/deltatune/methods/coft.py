"""COFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, constrained. Qiu et al., NeurIPS 2023. 2306.07280

    OFT with  ||Q_i||_F <= eps,    so that  ||R_i - I||_F = 2 ||Q_i (I - Q_i)^-1||_F <= 2 eps

Q is projected onto the ball after each step of the optimizer, whose moments are left alone. The unit itself uses the
projection of its Q, with the gradient at that point, so the bound holds in loops without callbacks as well.

The norm is that of the whole matrix and of one block, whatever the number of blocks; other programs multiply eps by
block_size^2, or divide it by the root of the number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Run, Site
from deltatune.methods.oft import OFT, Rotation


@dataclass(frozen=True, kw_only=True)
class COFT(OFT):
    """`eps`: the paper takes 6e-5 for DreamBooth and 1e-3 for controllable generation; language models hardly move."""

    lr: ClassVar[float] = 1e-2
    eps: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise DeltatuneError(f"COFT: eps must be positive, got {self.eps}")

    def build(self, site: Site, shared: nn.Module | None) -> Constrained:
        return Constrained(site, (self.count(site),), self.block_size, self.magnitude, self.eps)

    def callbacks(self) -> Iterable[Callback]:
        return [_Projection()]


class Constrained(Rotation):
    def __init__(self, site: Site, shape: tuple[int, ...], size: int, magnitude: str, eps: float) -> None:
        super().__init__(site, shape, size, magnitude)
        self.eps = eps

    def orthogonal(self, q: Tensor) -> Tensor:
        inside = _onto(q, torch.linalg.matrix_norm(q, keepdim=True), self.eps)
        return super().orthogonal(inside + (q - q.detach()))

    @torch.no_grad()
    def project(self) -> None:
        norm = math.sqrt(2) * torch.linalg.vector_norm(self.q, dim=-1, keepdim=True)  # each entry is in Q_i twice
        self.q.copy_(_onto(self.q, norm, self.eps))


@torch.no_grad()
def _onto(q: Tensor, norm: Tensor, eps: float) -> Tensor:
    return q * (eps / norm).clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class _Projection(Callback):
    def start(self, run: Run) -> Events:
        return _Project()


class _Project(Events):
    def on_step_end(self, run: Run) -> None:
        for _, unit in () if run.adapter is None else run.adapter.units():
            for module in unit.modules():
                if isinstance(module, Constrained):
                    module.project()
