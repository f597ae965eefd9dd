"""What a block does to each token between its matrix products, one autograd node each.

    RMS norm        y = w x / rho,   rho = sqrt(mean(x^2) + eps)           (Zhang & Sennrich 2019, arXiv:1910.07467)
                    dx = (w dy - x mean(w dy x) / rho^2) / rho,   dw = sum of dy x / rho over the tokens
    gated SiLU      y = g s(g) u,    s the logistic function                            (Shazeer 2020, arXiv:2002.05202)
                    du = dy g s(g),   dg = dy u s(g) (1 + g (1 - s(g)))

Operation by operation, autograd passes over memory some eight times for a norm, where three passes do, and keeps
g s(g), which costs less to compute again than to hold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d), weight (d,) -> (..., d). Computed in fp32 or wider, rounded to x's precision before the weight."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., m) -> (..., m)."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y = (wide * scale).to(x.dtype)
        return y.mul_(weight) if y.dtype == weight.dtype else y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, g = x.to(scale.dtype), gradient.to(scale.dtype)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (g * wide).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dx = g * weight.to(scale.dtype)
            along = torch.linalg.vecdot(dx, wide)[..., None].mul_(scale.pow(3)).div_(-x.shape[-1])
            dx = dx.mul_(scale).addcmul_(wide, along).to(x.dtype)
        return dx, dw, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = dup = None
        if ctx.needs_input_grad[1]:
            dup = F.silu(gate).mul_(gradient)
        if ctx.needs_input_grad[0]:
            dgate = torch.ops.aten.silu_backward(gradient * up, gate)
        return dgate, dup
