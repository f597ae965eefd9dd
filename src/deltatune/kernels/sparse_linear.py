"""A linear layer under a sparse difference, one autograd node.

    y = x W'^T + b,    vec(W')_i = vec(W)_i + v_j at i = indices_j
    dx = dy W',        dW = dy^T x,      dv_j = (dW)_i,      db = sum of dy over the tokens

The way back forms W' again, so that no copy of W waits for it, and gathers dv from dW at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_linear(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, i: Tensor) -> Tensor:
    """x (..., in), w (out, in), b (out,) or None, v (k,) at the distinct places i (k,) of the flattened w."""
    return _SparseLinear.apply(x, w, b, v, i)  # type: ignore[no-any-return, no-untyped-call]


def added(w: Tensor, v: Tensor, i: Tensor) -> Tensor:
    """W' in the precision of W: the sums are made in the wider one and rounded, as merging does."""
    flat, wide = w.reshape(-1), torch.promote_types(w.dtype, v.dtype)
    sums = flat.index_select(0, i).to(wide) + v.to(wide)
    return flat.index_copy(0, i.long(), sums.to(w.dtype)).view(w.shape)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, i: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, v, i)
        return F.linear(x, added(w, v, i).to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, v, i = ctx.saved_tensors
        gx = gw = gb = gv = None
        if ctx.needs_input_grad[0]:
            gx = (gy @ added(w, v, i).to(gy.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            gw = gy.reshape(-1, gy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(gy.dtype)
            gv = gw.reshape(-1).index_select(0, i).to(v.dtype)
        if ctx.needs_input_grad[2]:
            gb = gy.reshape(-1, gy.shape[-1]).sum(0)
        return gx, gw.to(w.dtype) if ctx.needs_input_grad[1] else None, gb, gv, None  # type: ignore[union-attr]
