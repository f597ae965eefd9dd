"""A frozen linear layer and a low-rank change of it, in one autograd node.

    Y = g (X W^T + s D(X) A^T B^T) + b        X (..., in), W (out, in), A (r, in), B (out, r), g (out,), D dropout

Saved for the backward pass: X only if A (or W) trains, H = D(X) A^T, (n, r), only if B trains, and neither the update
nor the dropout mask, which is drawn again from its seed. With G the gradient of Y times g, and P = G B, (n, r), made
once:

    dX = G W + s D^T(P A),    dA = s P^T D(X),    dB = s G^T H,    db = sum of the rows of the gradient of Y

and each of them only where it is asked for. Two small products forward, at most four backward. A quantised W runs its
own kernel forward and is dense only while dX is made.

Mostly there is no g, the magnitudes over the norms of DoRA. Where it trains, Z = (Y - b) / g is kept as well, as the
gradient of g is the sum over the rows of dY Z. The Y that is handed out would do only where no g is zero or small, and
X, which is kept anyway, costs a third large product to make Z of again.
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
              dropout: float = 0.0, magnitude: Tensor | None = None) -> Tensor:  # fmt: skip
    """The same, operation by operation: what is compiled, and what the node is checked against."""
    y = F.linear(x, w, bias)
    y = y + (scale * F.linear(F.linear(F.dropout(x.to(down.dtype), dropout), down), up)).to(y.dtype)
    return y if magnitude is None else scaled(y, bias, magnitude)[0]


def linear(x: Tensor, w: Tensor | Quantised, bias: Tensor | None, down: Tensor, up: Tensor, scale: float = 1.0,
           dropout: float = 0.0, seed: int | None = None, magnitude: Tensor | None = None) -> Tensor:  # fmt: skip
    """(..., in) -> (..., out). `dropout`: the probability, 0 outside of training; `seed`: of its mask, else drawn;
    `magnitude`: g."""
    if torch.compiler.is_compiling() and isinstance(w, Tensor):
        return reference(x, w, bias, down, up, scale, dropout, magnitude)
    if dropout and seed is None:
        seed = draw()
    given = (magnitude, scale, dropout, seed)
    node: Any = _Linear.apply if torch.is_grad_enabled() else _forward
    if (dtype := precision(x)) is None:
        return node(x, w, bias, down, up, *given)[0]  # type: ignore[no-any-return]
    x, down, up = (t.to(dtype) for t in (x, down, up))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind(x), enabled=False):
        return node(x, w, bias, down, up, *given)[0]  # type: ignore[no-any-return]


_may_autocast = cache(torch.amp.is_autocast_available)


def precision(x: Tensor) -> torch.dtype | None:
    """What autocast makes products with x in; None where it is off."""
    device = kind(x)
    on = _may_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def draw() -> int:
    """The seed of a mask."""
    return int(torch.randint(2**62, (), device="cpu"))


def dropped(x: Tensor, p: float, seed: int | None) -> Tensor:
    """D(x), and its transpose: the same elements are zero and the others scaled by 1 / (1 - p)."""
    if not p:
        return x
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(x.device).manual_seed(seed or 0)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(x).div_(1 - p)


def base(x: Tensor, w: Tensor | Quantised, bias: Tensor | None) -> Tensor:
    """X W^T + b, (n, in) -> (n, out). What autocast narrows of W is made again in backward rather than kept."""
    return w.product(x) if isinstance(w, Quantised) else F.linear(x, w.to(x.dtype), bias)


def scaled(y: Tensor, bias: Tensor | None, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """g Z + b, and Z, of y = Z + b. A g near one would lose in half precision most of what it differs from one by."""
    z = y if bias is None else y - bias.to(y.dtype)
    return torch.addcmul(y, z, (magnitude - 1).to(y.dtype)), z


def _forward(x: Tensor, w: Tensor | Quantised, bias: Tensor | None, down: Tensor, up: Tensor,
             magnitude: Tensor | None, scale: float, dropout: float,
             seed: int | None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Y, H (n, r), and Z (n, out) if there is a magnitude."""
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(dropped(flat.to(down.dtype), dropout, seed), down)
    y, z = base(flat, w, bias), None
    if y.dtype == up.dtype:
        y.addmm_(h, up.t(), alpha=scale)
    else:
        y.add_(torch.mm(h, up.t()).to(y.dtype), alpha=scale)
    if magnitude is not None:
        y, z = scaled(y, bias, magnitude)
    return y.view(*x.shape[:-1], -1), h, z


def through(g: Tensor, up: Tensor) -> Tensor:
    """P = G B, (n, out) -> (n, r). Read along its rows, B runs twice as fast."""
    return torch.mm(g, up if g.shape[0] < MANY else up.t().contiguous().t())


def inner(p: Tensor, x: Tensor, scale: float, like: Tensor) -> Tensor:
    """s P^T X, (r, n) by (n, d), of the shape of `like`.

    On a CPU in four parts: of a product with so few rows, threads get nothing to share."""
    rows = x.shape[0]
    if rows < MANY or kind(x) != "cpu":
        return torch.addmm(like, p.t(), x, beta=0, alpha=scale)
    n = rows // 4 * 4
    parts = torch.bmm(p[:n].unflatten(0, (4, -1)).transpose(1, 2), x[:n].unflatten(0, (4, -1)))
    whole = parts.sum(0) if n == rows else parts.sum(0).addmm_(p[n:].t(), x[n:])
    return whole.mul_(scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | Quantised, bias: Tensor | None, down: Tensor, up: Tensor,
                magnitude: Tensor | None, scale: float, dropout: float, seed: int | None) -> tuple[Tensor]:  # fmt: skip
        y, h, z = _forward(x, w, bias, down, up, magnitude, scale, dropout, seed)
        _, trains_w, _, trains_down, trains_up, trains_magnitude, *_ = ctx.needs_input_grad
        ctx.quantised = w if isinstance(w, Quantised) else None
        kept = None if isinstance(w, Quantised) else w
        x_or_none = x if trains_down or trains_w else None
        h_or_none, z_or_none = h if trains_up else None, z if trains_magnitude else None
        ctx.save_for_backward(x_or_none, kept, down, up, magnitude, h_or_none, z_or_none)
        ctx.options, ctx.input = (scale, dropout, seed), (x.shape, x.dtype)
        return (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w, down, up, magnitude, h, z = ctx.saved_tensors
        (scale, dropout, seed), (shape, dtype) = ctx.options, ctx.input
        needs_x, needs_w, needs_bias, needs_down, needs_up, needs_magnitude, *_ = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        flat: Any = None if x is None else x.reshape(-1, shape[-1])
        dx = dw = db = ddown = dup = dmagnitude = None
        if needs_bias:
            db = g.sum(0)
        if needs_magnitude:
            dmagnitude = (g * z).sum(0, dtype=magnitude.dtype)
        if magnitude is not None:
            g = torch.addcmul(g, g, (magnitude - 1).to(g.dtype))
        narrow = g.to(up.dtype)
        if needs_x or needs_down:
            p = through(narrow, up)
        if needs_down:
            ddown = inner(p, dropped(flat.to(down.dtype), dropout, seed), scale, down)
        if needs_up:
            dup = inner(h, narrow, scale, up.t()).t()  # (r, out) runs faster than (out, r)
        if needs_x:
            dx = torch.mm(g, (w if ctx.quantised is None else ctx.quantised.weight()).to(g.dtype))
            if dropout or dx.dtype != down.dtype:
                dx.add_(dropped(torch.mm(p, down), dropout, seed).to(dtype), alpha=scale)
            else:
                dx.addmm_(p, down, alpha=scale)
            dx = dx.view(shape)
        if needs_w:
            dw = torch.mm(g.t(), flat)
        return dx, dw, db, ddown, dup, dmagnitude, None, None, None
