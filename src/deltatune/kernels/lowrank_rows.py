"""A frozen linear layer whose rows of a batch are under low-rank changes of their own, in one autograd node.

    Y = X W^T + b,    Y[i] += s_i D_i(X[i]) A_i^T B_i^T        X (batch, ..., in); i the rows of one adapter

The frozen products, X W^T and dY W, are made once for all rows, and X, if any A_i trains, is kept once, however many
adapters there are. Ranks, scales and precisions may differ. Rows in no part have Y = X W^T + b alone. With G_i the
gradient of Y[i] and P_i = G_i B_i:

    dX = dY W,    dX[i] += s_i D_i^T(P_i A_i),    dA_i = s_i P_i^T D_i(X[i]),    dB_i = s_i G_i^T H_i
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltatune.kernels import lowrank
from deltatune.kernels.device import kind
from deltatune.kernels.lowrank import Quantised, dropped, inner

Rows = slice | Tensor  # of the batch; in place as a slice, gathered as indices


class Part(NamedTuple):
    """A low-rank change, as in `lowrank.linear`."""

    up: Tensor
    down: Tensor
    scale: float = 1.0
    dropout: float = 0.0
    seed: int | None = None


class _Segment(NamedTuple):
    rows: Rows
    scale: float
    dropout: float
    seed: int | None


def reference(x: Tensor, w: Tensor, bias: Tensor | None, rows: Tensor, parts: Sequence[Part]) -> Tensor:
    """The same, operation by operation: what is compiled, and what the node is checked against."""
    y = F.linear(x, w, bias)
    for i, (up, down, scale, dropout, _) in enumerate(parts):
        update = scale * F.linear(F.linear(F.dropout(x.to(down.dtype), dropout), down), up)
        y = y + torch.where((rows == i).view(-1, *[1] * (x.ndim - 1)), update, 0).to(y.dtype)
    return y


def linear(x: Tensor, w: Tensor | Quantised, bias: Tensor | None, rows: Tensor, parts: Sequence[Part]) -> Tensor:
    """(batch, ..., in) -> (batch, ..., out), row i under `parts[rows[i]]`, or under none where `rows[i]` is -1."""
    if torch.compiler.is_compiling() and isinstance(w, Tensor):
        return reference(x, w, bias, rows, parts)
    segments: list[_Segment] = []
    factors: list[Tensor] = []
    for i, where in segments_of(rows):
        up, down, scale, dropout, seed = parts[i]
        segments.append(_Segment(where, scale, dropout, lowrank.draw() if dropout and seed is None else seed))
        factors += [up, down]
    node: Any = _Rows.apply if torch.is_grad_enabled() else _forward
    if (dtype := lowrank.precision(x)) is None:
        return node(x, w, bias, segments, *factors)[0]  # type: ignore[no-any-return]
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind(x), enabled=False):
        return node(x.to(dtype), w, bias, segments, *(f.to(dtype) for f in factors))[0]  # type: ignore[no-any-return]


def segments_of(rows: Tensor) -> list[tuple[int, Rows]]:
    """(i, its rows of the batch, in order) of every part that has any. `rows` is not
    written to afterwards: a device waits for this once for each tensor."""
    if rows not in _SEGMENTS:
        _SEGMENTS[rows] = _segments(rows)
    return _SEGMENTS[rows]


_SEGMENTS: MutableMapping[Tensor, list[tuple[int, Rows]]] = WeakIdKeyDictionary()


def _segments(rows: Tensor) -> list[tuple[int, Rows]]:
    found: list[tuple[int, Rows]] = []
    host = rows.cpu()
    for i in host.unique().tolist():
        if i < 0:
            continue
        mine = (host == i).nonzero().flatten()
        first, after = int(mine[0]), int(mine[-1]) + 1
        found.append((i, slice(first, after) if after - first == len(mine) else mine.to(rows.device)))
    return found


def _take(x: Tensor, rows: Rows) -> Tensor:
    """(batch, t, d) -> (n, d)."""
    return (x[rows] if isinstance(rows, slice) else x.index_select(0, rows)).reshape(-1, x.shape[-1])


def _add(to: Tensor, rows: Rows, update: Tensor, scale: float) -> None:
    """to[rows] += s update, (batch, t, d) and (n, d)."""
    update = update.to(to.dtype).view(-1, *to.shape[1:])
    if isinstance(rows, slice):
        to[rows].add_(update, alpha=scale)
    else:
        to.index_add_(0, rows, update, alpha=scale)


def _add_product(to: Tensor, rows: Rows, h: Tensor, w: Tensor, scale: float) -> None:
    """to[rows] += s h w, (n, r) by (r, d)."""
    if isinstance(rows, slice) and to.dtype == w.dtype:
        to[rows].view(-1, to.shape[-1]).addmm_(h, w, alpha=scale)
    else:
        _add(to, rows, torch.mm(h, w), scale)


def _forward(x: Tensor, w: Tensor | Quantised, bias: Tensor | None, segments: Sequence[_Segment],
             *factors: Tensor) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Y, and each segment's H (n, r)."""
    flat = x.reshape(-1, x.shape[-1])
    y = lowrank.base(flat, w, bias)
    hs: list[Tensor] = []
    xs, ys = flat.view(len(x), -1, flat.shape[1]), y.view(len(x), -1, y.shape[1])
    for (rows, scale, dropout, seed), up, down in zip(segments, factors[::2], factors[1::2], strict=True):
        h = F.linear(dropped(_take(xs, rows).to(down.dtype), dropout, seed), down)
        _add_product(ys, rows, h, up.t(), scale)
        hs.append(h)
    return y.view(*x.shape[:-1], -1), hs


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | Quantised, bias: Tensor | None, segments: Sequence[_Segment],
                *factors: Tensor) -> tuple[Tensor]:  # fmt: skip
        y, hs = _forward(x, w, bias, segments, *factors)
        _, trains_w, _, _, *trains = ctx.needs_input_grad
        ctx.quantised = w if isinstance(w, Quantised) else None
        kept = None if isinstance(w, Quantised) else w
        hs_or_none = [h if needed else None for h, needed in zip(hs, trains[::2], strict=True)]
        ctx.save_for_backward(x if trains_w or any(trains[1::2]) else None, kept, *factors, *hs_or_none)
        ctx.segments, ctx.shape = segments, x.shape
        return (y,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n, shape = len(ctx.segments), ctx.shape
        x, w, *kept = ctx.saved_tensors
        factors, hs = kept[: 2 * n], kept[2 * n :]
        needs_x, needs_w, needs_bias, _, *needs = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])
        gs = g.view(shape[0], -1, g.shape[1])
        xs: Any = None if x is None else x.reshape(shape[0], -1, shape[-1])
        dxs: Any = None
        if needs_x:
            dense = w if ctx.quantised is None else ctx.quantised.weight()
            dxs = torch.mm(g, dense.to(g.dtype)).view(shape[0], -1, shape[-1])
        given: list[Tensor | None] = []
        for i, (rows, scale, dropout, seed) in enumerate(ctx.segments):
            (up, down), (needs_up, needs_down) = factors[2 * i : 2 * i + 2], needs[2 * i : 2 * i + 2]
            dup = ddown = None
            if needs_x or needs_up or needs_down:
                mine = _take(gs, rows).to(up.dtype)
            if needs_x or needs_down:
                p = lowrank.through(mine, up)
            if needs_up:
                dup = inner(hs[i], mine, scale, up.t()).t()  # (r, out) runs faster than (out, r)
            if needs_down:
                ddown = inner(p, dropped(_take(xs, rows).to(down.dtype), dropout, seed), scale, down)
            if needs_x and dropout:
                _add(dxs, rows, dropped(torch.mm(p, down), dropout, seed), scale)
            elif needs_x:
                _add_product(dxs, rows, p, down, scale)
            given += [dup, ddown]
        dx = dxs.view(shape) if needs_x else None
        dw = torch.mm(g.t(), xs.flatten(0, 1)) if needs_w else None
        return dx, dw, g.sum(0) if needs_bias else None, None, *given
