"""Means over the tokens that a token may attend to.

A mean over the whole sequence would tell a token of a causal model its future, one of a padded row the padding, and
one of a packed row the other documents. The mask that attention is given says what it may see, and an attention whose
logits are all equal is the mean over just that. What earlier tokens had is one more layer of their key-value cache, so
that beams are reordered and rejected tokens dropped there as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from deltatune.core.errors import DeltatuneError
from deltatune.models.calls import arguments

_WIDTH = 8  # of heads, which fused kernels want aligned


@dataclass
class Seen:
    """What the tokens of a block see: `batch` rows of n, of which `rows` (b,) are meant, None for all. `mask` (b or 1,
    1, n or 1, keys) is true where attention may look; `cache` is one of `depth` blocks; `gate` (b, n, 1) is on its way
    from the call of an attention to its function."""

    depth: int
    batch: int
    n: int
    mask: Tensor | None
    causal: bool
    cache: Any
    rows: Tensor | None = None
    gate: Tensor | None = None

    def mean(self, x: Tensor, key: str) -> Tensor:
        """x (b, n, 1), or as many numbers in another shape -> at each token, the mean of what it may see."""
        own = x.reshape(-1, 1, self.n, 1)
        every, mask = own if self.cache is None else self._remembered(own, key), self.mask
        if mask is not None and mask.shape[-1] > every.shape[2]:
            raise DeltatuneError(
                f"a mean over visible tokens has {every.shape[2]} of them, and the mask {mask.shape[-1]} places: start "
                "a cache that grows with the tokens under the adapter that goes on with it"
            )
        if mask is not None:
            every = every[:, :, -mask.shape[-1] :]  # all, but where a sliding window forgets
        query, keys = (own.new_zeros(len(own), 1, m, _WIDTH) for m in (self.n, every.shape[2]))
        y = F.scaled_dot_product_attention(query, keys, F.pad(every, (0, _WIDTH - 1)), mask, is_causal=self.causal)
        return y[..., :1].reshape(x.shape).to(x.dtype)

    def _remembered(self, own: Tensor, key: str) -> Tensor:
        if not isinstance(self.cache, DynamicCache):
            kind = type(self.cache).__name__
            raise DeltatuneError(f"a mean over visible tokens cannot be kept in a {kind}; give a DynamicCache, or none")
        if self.rows is not None:
            own = own.new_zeros(self.batch, *own.shape[1:]).index_copy(0, self.rows, own)
        every = _layer(self.cache, self.depth, key).update(own, own[..., :0])[0]
        return every if self.rows is None else every.index_select(0, self.rows)


def named(cache: Any) -> list[DynamicLayer]:
    """The layers of `cache` that are found by their names, wherever they lie."""
    return list(getattr(cache, "visible", {}).values())


def _layer(cache: Any, depth: int, key: str) -> DynamicLayer:
    """The layer of `cache` named `key`; the new ones come behind those of the `depth` blocks."""
    if not hasattr(cache, "visible"):
        cache.visible = {}
        cache.layers.extend(DynamicLayer() for _ in range(depth - len(cache.layers)))
    if key not in cache.visible:
        cache.visible[key] = DynamicLayer()
        cache.layers.append(cache.visible[key])
    return cache.visible[key]  # type: ignore[no-any-return]


class Visible:
    """What is seen in the block that is running under an adapter, one a thread: from its self-attention on."""

    def __init__(self) -> None:
        self.blocks: dict[int, Seen] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": {}}

    def thread(self) -> int:
        return 0 if torch.compiler.is_compiling() else get_ident()

    def enter(self, call: Any, args: Any, kwargs: Any, depth: int, rows: Tensor | None) -> None:
        """At a self-attention module's call, of which `rows` are meant."""
        a = arguments(call.module, args, kwargs)
        x, mask = next(iter(a.values())), next((a[n] for n in ("attention_mask", "mask") if n in a), None)
        cache = next((a[n] for n in ("past_key_values", "layer_past") if n in a), None)
        cache = getattr(cache, "self_attention_cache", cache)
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask == 0)[:, :1]
            mask = mask if rows is None or len(mask) == 1 else mask.index_select(0, rows)
        causal = mask is None and x.shape[1] > 1 and bool(getattr(call.module, "is_causal", False))
        self.blocks[self.thread()] = Seen(depth, len(x), x.shape[1], mask, causal, cache, rows)

    def now(self) -> Seen:
        if (seen := self.blocks.get(self.thread())) is None:
            raise DeltatuneError("a gate's input came before its block's self-attention ran; call the whole model")
        return seen

    def leave(self) -> None:
        del self.blocks[self.thread()]


class Gate(nn.Linear):
    """The mean of sigmoid(w x + c) over the tokens that each token may attend to: x (b, n, d) -> (b, n, 1)."""

    roles = {"weight": "gate", "bias": "gate"}

    def __init__(self, visible: Visible, width: int, **like: Any) -> None:
        super().__init__(width, 1, **like)
        self.visible, self.key = visible, uuid4().hex

    def forward(self, x: Tensor) -> Tensor:
        return self.visible.now().mean(super().forward(x.to(self.weight.dtype)).sigmoid(), self.key)
