"""A frozen linear layer and a low-rank change of it, in one autograd node.

    Y = X W^T + b + s D(X) A^T B^T        X (..., in), W (out, in), A (r, in), B (out, r), D dropout

Saved for the backward pass: X only if A (or W) trains, H = D(X) A^T, (n, r), only if B trains, and neither the update
nor the dropout mask, which is drawn again from its seed. With G the gradient of Y, and P = G B, (n, r), made once:

    dX = G W + s D^T(P A),    dA = s P^T D(X),    dB = s G^T H,    db = sum of the rows of G

and each of them only where it is asked for. Two small products forward, at most four backward. A quantised W runs its
own kernel forward and is dense only while dX is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.kernels.device import kind

MANY = 256  # rows from which the shape of a small product matters more than what calling it costs


class Quantised(NamedTuple):
    """A frozen weight that is dense for a moment only: `product` (n, in) -> (n, out) is its own kernel, bias and all;
    `weight` makes (out, in), in the backward pass."""

    product: Callable[[Tensor], Tensor]
    weight: Callable[[], Tensor]


def reference(x: Tensor, w: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float = 1.0,
              dropout: float = 0.0) -> Tensor:  # fmt: skip
    """The same, operation by operation: what is compiled, and what the node is checked against."""
    y = F.linear(x, w, bias)
    return y + (scale * F.linear(F.linear(F.dropout(x.to(down.dtype), dropout), down), up)).to(y.dtype)


def linear(x: Tensor, w: Tensor | Quantised, bias: Tensor | None, down: Tensor, up: Tensor, scale: float = 1.0,
           dropout: float = 0.0, seed: int | None = None) -> Tensor:  # fmt: skip
    """(..., in) -> (..., out). `dropout`: the probability, 0 outside of training; `seed`: of its mask, else drawn."""
    if torch.compiler.is_compiling() and isinstance(w, Tensor):
        return reference(x, w, bias, down, up, scale, dropout)
    if dropout and seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    device, given = kind(x), (scale, dropout, seed)
    node: Any = _Linear.apply if torch.is_grad_enabled() else _forward
    if not _may_autocast(device) or not torch.is_autocast_enabled(device):
        return node(x, w, bias, down, up, *given)[0]  # type: ignore[no-any-return]
    dtype = torch.get_autocast_dtype(device)
    x, down, up = (t.to(dtype) for t in (x, down, up))
    w = w.to(dtype) if isinstance(w, Tensor) else w
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return node(x, w, bias, down, up, *given)[0]  # type: ignore[no-any-return]


_may_autocast = cache(torch.amp.is_autocast_available)


def _dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    """D(x), and its transpose: the same elements are zero and the others scaled by 1 / (1 - p)."""
    if not p:
        return x
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(x.device).manual_seed(seed or 0)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(x).div_(1 - p)


def _forward(x: Tensor, w: Tensor | Quantised, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
             dropout: float, seed: int | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y, and H (n, r)."""
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(_dropped(flat.to(down.dtype), dropout, seed), down)
    if isinstance(w, Quantised):
        y = w.product(flat)
    else:
        y = F.linear(flat, w, bias)
    if y.dtype == up.dtype:
        y.addmm_(h, up.t(), alpha=scale)
    else:
        y.add_(torch.mm(h, up.t()).to(y.dtype), alpha=scale)
    return y.view(*x.shape[:-1], -1), h


def _inner(p: Tensor, x: Tensor, scale: float, like: Tensor) -> Tensor:
    """s P^T X, (r, n) by (n, d), of the shape of `like`.

    On a CPU in four parts: of a product with so few rows, threads get nothing to share."""
    rows = x.shape[0]
    if rows < MANY or kind(x) != "cpu":
        return torch.addmm(like, p.t(), x, beta=0, alpha=scale)
    n = rows // 4 * 4
    parts = torch.bmm(p[:n].unflatten(0, (4, -1)).transpose(1, 2), x[:n].unflatten(0, (4, -1)))
    inner = parts.sum(0) if n == rows else parts.sum(0).addmm_(p[n:].t(), x[n:])
    return inner.mul_(scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | Quantised, bias: Tensor | None, down: Tensor, up: Tensor, scale: float,
                dropout: float, seed: int | None) -> tuple[Tensor]:  # fmt: skip
        y, h = _forward(x, w, bias, down, up, scale, dropout, seed)
        _, trains_w, _, trains_down, trains_up, *_ = ctx.needs_input_grad
        ctx.quantised = w if isinstance(w, Quantised) else None
        kept = None if isinstance(w, Quantised) else w
        ctx.save_for_backward(x if trains_down or trains_w else None, kept, down, up, h if trains_up else None)
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
            # read along its rows, B runs twice as fast
            p = torch.mm(narrow, up if g.shape[0] < MANY else up.t().contiguous().t())
        if needs_down:
            ddown = _inner(p, _dropped(flat.to(down.dtype), dropout, seed), scale, down)
        if needs_up:
            dup = _inner(h, narrow, scale, up.t()).t()  # (r, out) runs faster than (out, r)
        if needs_x:
            dx = torch.mm(g, w if ctx.quantised is None else ctx.quantised.weight().to(g.dtype))
            if dropout or dx.dtype != down.dtype:
                dx.add_(_dropped(torch.mm(p, down), dropout, seed).to(dtype), alpha=scale)
            else:
                dx.addmm_(p, down, alpha=scale)
            dx = dx.view(shape)
        if needs_w:
            dw = torch.mm(g.t(), flat)
        if needs_bias:
            db = g.sum(0)
        return dx, dw, db, ddown, dup, None, None, None
