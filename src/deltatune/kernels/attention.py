"""Causal attention of packed documents: each sees itself, and the tokens before all of them that they share.

A row of T tokens is `shared` tokens, then documents. Since a token's hidden states depend on nothing behind it, what
all documents begin with need be computed but once, and its gradient is the sum over them. On a CPU the documents of
like length are laid side by side and cut into pieces of some query rows, with the keys up to a piece's end: the n-th
pieces of all of them are one product of matrices, in which neither other documents nor the future beyond the piece cost
anything; elsewhere `flex_attention` skips the same blocks.
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

PIECE = 64  # query rows of one product: smaller ones compute less of the future, larger ones run faster


class Group(NamedTuple):
    """D documents of like length, the longest first, padded to `len(counts)` pieces of P rows.

    `queries` (D, n) and `keys` (D, shared + n): which of the T tokens a place holds, some token where there is none;
    `padding`: the places of `queries`, flattened, that hold none; `counts`: how many documents have a first, a second
    piece and so on."""

    shared: int
    queries: Tensor
    keys: Tensor
    padding: Tensor
    counts: tuple[int, ...]


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
    def groups(self) -> tuple[tuple[Group, ...], Tensor]:
        """The groups, and (T,) the place of each token among those of all groups' queries, one after the other."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        begin = 0
        for shared, length in ((0, self.shared), *((self.shared, n) for n in self.lengths)):
            if length:
                alike = (-(-length // PIECE) - 1).bit_length()  # 1, 2, 3 to 4, 5 to 8 pieces: at most half is padding
                found.setdefault((shared, alike), []).append((length, begin))
            begin += length
        groups, places, at = [], torch.empty(self.total, dtype=torch.long), 0
        for (shared, _), documents in found.items():
            documents.sort(reverse=True)
            length, begin = torch.tensor(documents).t()[..., None]
            counts = tuple(sum(n > start for n, _ in documents) for start in range(0, documents[0][0], PIECE))
            column = torch.arange(len(counts) * PIECE)
            queries, real = begin + column.minimum(length - 1), column < length
            before = torch.arange(shared).expand(len(documents), -1)
            groups.append(
                Group(shared, queries, torch.cat([before, queries], 1), (~real).flatten().nonzero()[:, 0], counts)
            )
            places[queries[real]] = at + real.flatten().nonzero()[:, 0]
            at += queries.numel()
        return tuple(groups), places

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
        return _in_pieces(q, k, v, blocks, scale)
    run: Any = torch.compile(flex_attention) if not torch.compiler.is_compiling() else flex_attention
    y = run(q, k, v, block_mask=blocks.mask(q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


@torch.compiler.disable  # its shapes are those of this batch's documents
def _in_pieces(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y: Tensor = _Pieces.apply(q[0], k[0], v[0], *blocks.groups, scale)  # type: ignore[no-untyped-call]
        return y[None]


class _Pieces(torch.autograd.Function):
    """q (heads, T, d), k and v (kv heads, T, d) -> (T, heads, d). The probabilities are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], places: Tensor, scale: float
                ) -> Tensor:  # fmt: skip
        made, future = [], q.new_full((PIECE, PIECE), -math.inf).triu_(1)
        for group in groups:
            queries, keys, values = _queries(q, k, group), _keys(k, group), _keys(v, group)
            out = (
                torch.empty_like(queries)
                if q.shape[2] == v.shape[2]
                else queries.new_empty(*queries.shape[:-1], v.shape[2])
            )
            for i in range(len(group.counts)):
                p = _probabilities(_piece(queries, group, i), _past(keys, group, i), future, scale)
                torch.bmm(p, _past(values, group, i), out=_piece(out, group, i))
            made.append(out)
        ctx.save_for_backward(q, k, v)
        ctx.layout = groups, places, scale
        return _tokens(made, len(q), places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        groups, places, scale = ctx.layout
        g, future = gradient.transpose(0, 1), q.new_full((PIECE, PIECE), -math.inf).triu_(1)
        made: list[list[Tensor]] = [[], [], []]
        before = [
            k.new_zeros(len(k), groups[-1].shared, k.shape[2]),
            v.new_zeros(len(v), groups[-1].shared, v.shape[2]),
        ]
        for group in groups:
            queries, keys, values = _queries(q, k, group), _keys(k, group), _keys(v, group)
            go = _queries(g, v, group, padding=0.0)
            dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
            for i in range(len(group.counts)):
                rows, past, own = _piece(queries, group, i), _past(keys, group, i), _piece(go, group, i)
                p = _probabilities(rows, past, future, scale)
                _past(dv, group, i).add_(torch.bmm(p.transpose(1, 2), own))
                dp = torch.bmm(own, _past(values, group, i).transpose(1, 2))
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                _past(dk, group, i).add_(torch.bmm(ds.transpose(1, 2), rows), alpha=scale)
                _piece(dq, group, i).baddbmm_(ds, past, beta=0, alpha=scale)
            made[0].append(dq)
            for d, all_of_it, shared in zip((dk, dv), made[1:], before, strict=True):
                if group.shared:
                    shared += d[:, :, : group.shared].sum(0)
                all_of_it.append(d[None, :, :, group.shared :])
        dq, dk, dv = (
            _tokens(parts, n, places).transpose(0, 1) for parts, n in zip(made, (len(q), len(k), len(v)), strict=True)
        )
        for d, shared in zip((dk, dv), before, strict=True):
            d[:, : shared.shape[1]] += shared
        return dq, dk, dv, None, None, None


def _queries(q: Tensor, k: Tensor, group: Group, padding: float | None = None) -> Tensor:
    """(heads, T, d) -> (pieces, D, kv heads, heads per kv head x P, d): heads that share keys are rows of one product.

    `padding`: what stands where there is no token."""
    rows = q.transpose(0, 1).index_select(0, group.queries.flatten())
    if padding is not None:
        rows.index_fill_(0, group.padding.to(rows.device), padding)
    n = len(group.counts)
    rows = rows.view(len(group.queries), n, PIECE, len(k), -1, q.shape[2]).permute(1, 0, 3, 4, 2, 5)
    return rows.contiguous().view(n, len(group.queries), len(k), -1, q.shape[2])


def _keys(k: Tensor, group: Group) -> Tensor:
    """(kv heads, T, d) -> (D, kv heads, shared + n, d)."""
    rows = k.transpose(0, 1).index_select(0, group.keys.flatten())
    return rows.view(*group.keys.shape, *rows.shape[1:]).transpose(1, 2).contiguous()


def _tokens(parts: Sequence[Tensor], heads: int, places: Tensor) -> Tensor:
    """(pieces, D, kv heads, ..., d) of each group -> (T, heads, d)."""
    d, sizes = parts[0].shape[-1], [p.numel() // (heads * parts[0].shape[-1]) for p in parts]
    rows = parts[0].new_empty(sum(sizes), heads, d)
    for into, part in zip(rows.split(sizes), parts, strict=True):
        source = part.view(*part.shape[:3], heads // part.shape[2], -1, d).permute(1, 0, 4, 2, 3, 5)
        into.view(source.shape).copy_(source)
    return rows.index_select(0, places)


def _piece(x: Tensor, group: Group, i: int) -> Tensor:
    """The i-th piece of each document that has one, a view: (D' x kv heads, heads per kv head x P, d)."""
    return x[i, : group.counts[i]].view(-1, *x.shape[3:])


def _past(x: Tensor, group: Group, i: int) -> Tensor:
    """What that piece sees, a view: (D' x kv heads, shared + (i + 1) P, d)."""
    end = group.shared + (i + 1) * PIECE
    return x[: group.counts[i], :, :end].view(-1, end, x.shape[3])


def _probabilities(queries: Tensor, keys: Tensor, future: Tensor, scale: float) -> Tensor:
    s = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
    s.baddbmm_(queries, keys.transpose(1, 2), beta=0, alpha=scale)
    s.view(len(s), -1, PIECE, s.shape[2])[..., -PIECE:].add_(future)
    return torch.softmax(s, -1, dtype=torch.promote_types(s.dtype, torch.float32)).to(s.dtype)
