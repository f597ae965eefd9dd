"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning. Qiu et al., NeurIPS 2023. arXiv:2306.07280

    W' = W R^T,    R = diag(R_1, ..., R_g) in R^{in x in},    R_i = (I + Q_i) (I - Q_i)^-1,    Q_i = -Q_i^T

for the paper's z = (R W)^T x, whose W is (in, out). The Cayley transform makes each R_i a rotation, so the neurons, the
rows of W, keep their norms and angles. Q is zero, hence W' = W, at the start. A linear layer becomes W (R^T x) + b: its
input is rotated block by block, and the bias is not touched. A kernel is rotated flattened to (out, in x kernel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """`blocks`: each of the in / block_size blocks has its own Q, or all share one. With a "learned" magnitude it is
    the paper's re-scaled OFT, W' = diag(d) W R^T, where d starts at one."""

    lr: ClassVar[float] = 2e-3
    block_size: int = 32
    blocks: Literal["own", "shared"] = "own"
    magnitude: Literal["kept", "learned"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.block_size < 2:
            raise DeltatuneError(f"{name}: block_size must be at least 2, got {self.block_size}")
        if self.blocks not in ("own", "shared"):
            raise DeltatuneError(f"{name}: blocks is 'own' or 'shared', got {self.blocks!r}")
        if self.magnitude not in ("kept", "learned"):
            raise DeltatuneError(f"{name}: magnitude is 'kept' or 'learned', got {self.magnitude!r}")

    def count(self, site: Site) -> int:
        """The number of Q at a site."""
        in_, size = site.shape.in_, self.block_size
        if in_ % size:
            fit = sorted((s for s in range(2, in_ + 1) if in_ % s == 0), key=lambda s: abs(s - size))
            advice = f"give {' or '.join(map(str, fit[:2]))}" if fit else "leave it out of the targets"
            name = type(self).__name__
            raise DeltatuneError(f"{name}: {site.path!r} has {in_} inputs, no multiple of block_size={size}; {advice}")
        return 1 if self.blocks == "shared" else in_ // size

    def build(self, site: Site, shared: nn.Module | None) -> Rotation:
        return Rotation(site, (self.count(site),), self.block_size, self.magnitude)


def skew(q: Tensor, size: int) -> Tensor:
    """Q (..., size, size) from what is above its diagonal, row by row: (..., size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    upper = q.new_zeros(*q.shape[:-1], size, size)
    upper[..., rows, columns] = q
    return upper - upper.mT


def blockwise(x: Tensor, r: Tensor) -> Tensor:
    """x diag(R_1, ..., R_g), (..., in), for r (g, size, size), or (1, size, size) where all blocks are the same."""
    h = x.unflatten(-1, (-1, r.shape[-1]))
    return torch.einsum("...gi,gij->...gj", h, r.expand(h.shape[-2], -1, -1)).flatten(-2)


class Rotation(Delta):
    """`q` (..., size (size - 1) / 2), each row a Q_i above its diagonal; `d` (out,) where the magnitude is learned."""

    roles = {"q": "rotation", "d": "scale"}
    undecayed = ("d",)

    def __init__(self, site: Site, shape: tuple[int, ...], size: int, magnitude: str) -> None:
        super().__init__()
        self.size = size
        self.q = nn.Parameter(torch.zeros(*shape, size * (size - 1) // 2, **site.like))
        self.d = nn.Parameter(torch.ones(site.shape.out, **site.like)) if magnitude == "learned" else None

    def orthogonal(self, q: Tensor) -> Tensor:
        """R_i of Q_i: the factors of the Cayley transform commute."""
        eye = torch.eye(self.size, dtype=q.dtype, device=q.device)
        return torch.linalg.solve(eye - q, eye + q)

    def rotations(self) -> Tensor:
        """(..., size, size), in fp32 or wider under autocast too: what is rounded here is no rotation."""
        with torch.autocast(self.q.device.type, enabled=False):
            return self.orthogonal(skew(self.q.to(torch.promote_types(self.q.dtype, torch.float32)), self.size))

    def turn(self, x: Tensor, r: Tensor) -> Tensor:
        """x R, (..., in)."""
        return blockwise(x, r)

    def turn_back(self, x: Tensor, r: Tensor) -> Tensor:
        """x R^T, (..., in)."""
        return blockwise(x, r.mT)

    def weight(self, w: Tensor) -> Tensor:
        r = self.rotations()
        dtype = torch.promote_types(w.dtype, r.dtype)
        turned = self.turn_back(w.to(dtype), r.to(dtype))
        return turned if self.d is None else self.d[:, None] * turned

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        y = call(self.turn(x.to(self.q.dtype), self.rotations().to(self.q.dtype)).to(x.dtype))
        if self.d is None:
            return y
        scale, bias = self.d.to(y.dtype), call.bias
        return scale * y if bias is None else scale * (y - bias) + bias
