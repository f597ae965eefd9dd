"""Causal attention of packed documents: each sees itself, and the tokens before all of them that they share.

A row of T tokens is `shared` tokens, then documents. Since a token's hidden states depend on nothing behind it, what
all documents begin with need be computed but once, and its gradient is the sum over them. On a CPU one product of
matrices is done for each piece of a document (query rows of one piece, keys up to its end), so that neither other
documents nor the future cost anything; elsewhere `flex_attention` skips the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from deltatune.kernels.device import kind

PIECE = 128  # query rows of one product: smaller ones compute less of the future, larger ones run faster


class Piece(NamedTuple):
    """Queries [start, stop) of the document that begins at `begin` and has `shared` tokens before it."""

    begin: int
    start: int
    stop: int
    shared: int


@dataclass(frozen=True)
class Blocks:
    """The layout of one packed row: `shared` tokens, then documents of `lengths` tokens each."""

    shared: int
    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.shared + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document, with those it shares."""
        return self.shared + max(self.lengths)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        pieces, begin = [], 0
        for shared, length in ((0, self.shared), *((self.shared, n) for n in self.lengths)):
            n = max(1, math.ceil(length / PIECE))
            cuts = [begin + length * i // n for i in range(n + 1)]
            pieces += [Piece(begin, a, b, shared) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
            begin += length
        return tuple(pieces)

    @cached_property
    def documents(self) -> Tensor:
        """(T,): the number of each token's document, from 1; 0 for the shared tokens."""
        lengths = torch.tensor([self.shared, *self.lengths])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def mask(self, device: torch.device) -> BlockMask:
        """The layout for `flex_attention`, made once on each device."""
        made: dict[torch.device, BlockMask] = self.__dict__.setdefault("_masks", {})
        if device not in made:
            of = self.documents.to(device)

            def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (q >= k) & ((of[q] == of[k]) | (of[k] == 0))

            made[device] = create_block_mask(sees, None, None, self.total, self.total, device=str(device))
        return made[device]


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float | None = None) -> Tensor:
    """q (1, heads, T, d), k and v (1, kv heads, T, d) -> (1, T, heads, d). `scale`: 1 / sqrt(d) unless given."""
    if q.shape[2] != blocks.total:
        raise ValueError(f"{q.shape[2]} queries for a layout of {blocks.total} tokens")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_autocast_enabled(kind(q)):
        q, k, v = (t.to(torch.get_autocast_dtype(kind(q))) for t in (q, k, v))
    if q.device.type in ("cpu", "meta"):
        with torch.autocast("cpu", enabled=False):
            y: Tensor = _Pieces.apply(q[0], k[0], v[0], blocks.pieces, scale)  # type: ignore[no-untyped-call]
            return y[None]
    run: Any = torch.compile(flex_attention) if not torch.compiler.is_compiling() else flex_attention
    y = run(q, k, v, block_mask=blocks.mask(q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class _Pieces(torch.autograd.Function):
    """q (heads, T, d), k and v (kv heads, T, d) -> (T, heads, d). The probabilities are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
        out = v.new_empty(q.shape[1], q.shape[0], v.shape[2])
        future = _future(q, pieces)
        for piece in pieces:
            p = _probabilities(_queries(q, k, piece, scale), _keys(k, piece), piece, future)
            o = torch.bmm(p, _keys(v, piece))
            rows = piece.stop - piece.start
            out[piece.start : piece.stop] = o.view(len(q), rows, -1).transpose(0, 1)
        ctx.save_for_backward(q, k, v)
        ctx.layout = pieces, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        pieces, scale = ctx.layout
        dq, dk, dv = (torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v))
        g, future = gradient.transpose(0, 1), _future(q, pieces)
        for piece in pieces:
            queries, keys, values = _queries(q, k, piece, scale), _keys(k, piece), _keys(v, piece)
            go = _queries(g, v, piece, 1.0)
            p = _probabilities(queries, keys, piece, future)
            _add(dv, torch.bmm(p.transpose(1, 2), go), piece)
            dp = torch.bmm(go, values.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            _add(dk, torch.bmm(ds.transpose(1, 2), queries), piece)
            rows = torch.bmm(ds, keys).mul_(scale)
            dq[:, piece.start : piece.stop] = rows.view(len(q), piece.stop - piece.start, -1)
        return dq, dk, dv, None, None


def _queries(q: Tensor, k: Tensor, piece: Piece, scale: float) -> Tensor:
    """(heads, T, d) -> (kv heads, group x rows, d), scaled: heads that share keys are rows of one product."""
    rows = q[:, piece.start : piece.stop]
    return (rows * scale if scale != 1 else rows).reshape(len(k), -1, q.shape[2])


def _keys(k: Tensor, piece: Piece) -> Tensor:
    own = k[:, piece.begin : piece.stop]
    return torch.cat([k[:, : piece.shared], own], 1) if piece.shared else own


def _add(into: Tensor, d: Tensor, piece: Piece) -> None:
    if piece.shared:
        into[:, : piece.shared] += d[:, : piece.shared]
    into[:, piece.begin : piece.stop] += d[:, piece.shared :]


def _future(q: Tensor, pieces: Sequence[Piece]) -> Tensor:
    n = max(piece.stop - piece.start for piece in pieces)
    return q.new_full((n, n), -math.inf).triu_(1)


def _probabilities(queries: Tensor, keys: Tensor, piece: Piece, future: Tensor) -> Tensor:
    n = piece.stop - piece.start
    s = torch.bmm(queries, keys.transpose(1, 2))
    s.view(len(s), -1, n, s.shape[2])[..., -n:].add_(future[:n, :n])
    return torch.softmax(s, -1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)
