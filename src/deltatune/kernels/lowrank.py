"""A frozen linear layer and a low-rank change of it, in one autograd node.

    Y = X W^T + b + s D(X) A^T B^T        X (..., in), W (out, in), A (r, in), B (out, r), D dropout

Saved for the backward pass: X only if A (or W) trains, H = D(X) A^T, (n, r), only if B trains, and neither the update
nor the dropout mask, which is drawn again from its seed. With G the gradient of Y, and P = s G B, (n, r), made once:

    dX = G W + D^T(P A),    dA = P^T D(X),    dB = s G^T H,    db = sum of the rows of G

and each of them only where it is asked for. Two small products forward, at most four backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.kernels.device import kind


def reference(x: Tensor, w: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float = 1.0,
              dropout: float = 0.0) -> Tensor:  # fmt: skip
    """The same, operation by operation: what is compiled, and what the node is checked against."""
    y = F.linear(x, w, bias)
    return y + (scale * F.linear(F.linear(F.dropout(x.to(down.dtype), dropout), down), up)).to(y.dtype)


def linear(x: Tensor, w: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float = 1.0,
           dropout: float = 0.0, seed: int | None = None) -> Tensor:  # fmt: skip
    """(..., in) -> (..., out). `dropout`: the probability, 0 outside of training; `seed`: of its mask, else drawn."""
    if torch.compiler.is_compiling():
        return reference(x, w, bias, down, up, scale, dropout)
    if dropout and seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    device, given = kind(x), (scale, dropout, seed)
    node: Any = _Linear.apply if torch.is_grad_enabled() else _forward
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return node(x, w, bias, down, up, *given)[0]  # type: ignore[no-any-return]
    dtype = torch.get_autocast_dtype(device)
    x, w, down, up = (t.to(dtype) for t in (x, w, down, up))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return node(x, w, bias, down, up, *given)[0]  # type: ignore[no-any-return]


def _dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    """D(x), and its transpose: the same elements are zero and the others scaled by 1 / (1 - p)."""
    if not p:
        return x
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(x.device).manual_seed(seed or 0)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(x).div_(1 - p)


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, dropout: float,
             seed: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y, and H (n, r)."""
    flat = x.reshape(-1, x.shape[-1])
    h = torch.mm(_dropped(flat.to(down.dtype), dropout, seed), down.t())
    y = torch.mm(flat, w.t()) if bias is None else torch.addmm(bias, flat, w.t())
    if y.dtype == up.dtype:
        y.addmm_(h, up.t(), alpha=scale)
    else:
        y.add_(torch.mm(h, up.t()).to(y.dtype), alpha=scale)
    return y.view(*x.shape[:-1], -1), h


def _inner(p: Tensor, x: Tensor) -> Tensor:
    """P^T X, (r, n) by (n, d). On a CPU in four parts: of a product with so few rows, threads get nothing to share."""
    if kind(x) != "cpu" or len(x) < 4:
        return torch.mm(p.t(), x)
    n = len(x) // 4 * 4
    parts = torch.bmm(p[:n].unflatten(0, (4, -1)).transpose(1, 2), x[:n].unflatten(0, (4, -1)))
    return parts.sum(0) if n == len(x) else parts.sum(0).addmm_(p[n:].t(), x[n:])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
                dropout: float, seed: int | None) -> tuple[Tensor]:  # fmt: skip
        y, h = _forward(x, w, bias, down, up, scale, dropout, seed)
        _, trains_w, _, trains_down, trains_up, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if trains_down or trains_w else None, w, down, up, h if trains_up else None)
        ctx.options, ctx.input = (scale, dropout, seed), (x.shape, x.dtype)
        return (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w, down, up, h = ctx.saved_tensors
        (scale, dropout, seed), (shape, dtype) = ctx.options, ctx.input
        needs_x, needs_w, needs_bias, needs_down, needs_up, *_ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        narrow = g.to(up.dtype)
        flat: Any = None if x is None else x.reshape(-1, shape[-1])
        dx = dw = db = ddown = dup = None
        if needs_x or needs_down:
            p = torch.mm(narrow, up.t().contiguous().t()).mul_(scale)  # read along its rows, B runs twice as fast
        if needs_down:
            ddown = _inner(p, _dropped(flat.to(down.dtype), dropout, seed))
        if needs_up:
            dup = _inner(h, narrow).mul_(scale).t().contiguous()  # (r, out) runs faster than (out, r)
        if needs_x:
            dx = torch.mm(g, w)
            if dropout or dx.dtype != down.dtype:
                dx.add_(_dropped(torch.mm(p, down), dropout, seed).to(dtype))
            else:
                dx.addmm_(p, down)
            dx = dx.view(shape)
        if needs_w:
            dw = torch.mm(g.t(), flat)
        if needs_bias:
            db = g.sum(0)
        return dx, dw, db, ddown, dup, None, None, None
