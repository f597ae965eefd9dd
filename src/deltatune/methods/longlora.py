"""LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models. Chen et al., ICLR 2024. arXiv:2309.12307

    heads [0, H/2):    attention within [0, G), [G, 2G), ..., [L - G, L)              G = L / groups
    heads [H/2, H):    within [0, G/2), [G/2, 3G/2), ..., [L - G/2, L)                shifted by half   (sec. 3.2)
    RoPE at position p / ceil(context / the base's)                                   position interpolation

The groups are for training: inference, and so a merged model, has full attention, at the same positions. Beside LoRA at
q, k, v and o, embeddings and norms are trained as they are (sec. 3.3). The shift has no wrap-around: no token sees one
behind it, as where the end of a rolled sequence would share a group with its start. A tied head keeps the base's
matrix. Where G does not divide L the last segments are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention, Method, Part, Select, Site
from deltatune.methods.lora import LoRA
from deltatune.methods.tune import Tune
from deltatune.models.attention import looks_up
from deltatune.models.positions import Interpolated, rotates


@dataclass(frozen=True, kw_only=True)
class LongLoRA(LoRA):
    """`context`: tokens of the longest sequence, where it exceeds the base's; None leaves the positions."""

    groups: int = 4
    context: int | None = None

    usual = ("q", "k", "v", "o")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1 or (self.context is not None and self.context < 1):
            now = f"groups={self.groups}, context={self.context}"
            raise DeltatuneError(f"LongLoRA: {now}: give at least 1; context=None leaves the positions")

    def parts(self) -> Sequence[Method]:
        positions = () if self.context is None else (_Interpolated(context=self.context),)
        return self, Tune(targets=Part("embedding", "norm")), _Shifted(groups=self.groups), *positions


@dataclass(frozen=True, kw_only=True)
class _Shifted(Method):
    groups: int

    usual = ("attention",)
    at = ("attention",)

    def build(self, site: Site, shared: nn.Module | None) -> Segments:
        if not looks_up(site.module) or getattr(site.config, "is_encoder_decoder", False):
            raise DeltatuneError(f"LongLoRA: {site.path} has no attention function of one sequence to cut in groups")
        return Segments(self.groups)


class Segments(Intervention):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def merged(self, module: nn.Module) -> Mapping[str, Any]:
        return {}  # inference has full attention

    def forward(self, call: Base, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        heads, n = query.shape[1:3]
        if not self.training or n != key.shape[2]:
            return call(query, key, value, mask, **kwargs)
        size, half = max(1, math.ceil(n / self.groups)), heads // 2
        share = heads // key.shape[1]  # query heads of a key-value head, which may lie in both halves
        low, high = half // share, math.ceil(half / share)

        def run(queries: slice, keys: slice, first: int) -> Tensor:
            """The heads within [0, first), then segments of `size`, then what is left: (b, n, heads, d)."""
            bounds = [0, first, first + (n - first) // size * size, n]
            some = mask if mask is None or mask.shape[1] == 1 else mask[:, queries]
            parts = query[:, queries], key[:, keys], value[:, keys]
            runs = [within(call, parts, some, i, j, min(size, j - i), kwargs)
                    for i, j in zip(bounds, bounds[1:], strict=False) if j > i]  # fmt: skip
            return torch.cat(runs, 1)

        plain = run(slice(0, high * share), slice(0, high), 0)[:, :, :half]
        shifted = run(slice(low * share, None), slice(low, None), size // 2)[:, :, half - low * share :]
        return torch.cat([plain, shifted], 2), None


def within(call: Base, qkv: Sequence[Tensor], mask: Tensor | None, start: int, stop: int, size: int,
           kwargs: dict[str, Any]) -> Tensor:  # fmt: skip
    """Attention within the segments of `size` of [start, stop), each a row of the batch: (b, tokens, heads, d)."""
    b, m = len(qkv[0]), (stop - start) // size
    rows = [t[:, :, start:stop].unflatten(2, (m, size)).transpose(1, 2).flatten(0, 1) for t in qkv]
    if mask is not None:  # (b, 1, n, n) -> the diagonal blocks (b m, 1, size, size)
        blocks = mask[..., start:stop, start:stop].unflatten(3, (m, size)).unflatten(2, (m, size)).diagonal(0, 2, 4)
        mask = blocks.permute(0, 4, 1, 2, 3).expand(b, -1, -1, -1, -1).flatten(0, 1)
    return call(*rows, mask, **kwargs)[0].unflatten(0, (b, m)).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class _Interpolated(Method):
    context: int

    targets: Select = rotates
    at = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> Interpolated:
        return Interpolated(math.ceil(self.context / site.config.max_position_embeddings))
