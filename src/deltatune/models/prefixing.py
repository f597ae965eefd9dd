"""Keys and values that every query may see besides those of the tokens: what prefixes do at an attention function.

They come after the rotary embedding and after the cache's update, so that no position is shifted and the cache holds
tokens alone. Relative position biases (T5) of the added keys are 0; ALiBi goes on below position 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.core.errors import DeltatuneError
from deltatune.core.method import Method, Site
from deltatune.core.select import Select
from deltatune.core.slot import switch_of
from deltatune.core.surgery import attach, detach, using
from deltatune.core.units import Base, Intervention
from deltatune.models import anatomy, attention
from deltatune.models.calls import accepted
from deltatune.models.prompting import Layout, Prompt
from deltatune.storage.layers import plain_class

_CROSS = re.compile(r"EncDecAttention|encoder_attn|crossattention|cross_attn")


def group(site: Site) -> str:
    """ "encoder", "decoder" or "cross": which of a model's attentions this is."""
    if _CROSS.search(site.path):
        return "cross"
    both = getattr(site.config, "is_encoder_decoder", False)
    return "decoder" if both and re.search(r"(^|\.)decoder\.", site.path) else "encoder"


def geometry(site: Site) -> tuple[int, int]:
    """(key-value heads, width of a head) of the attention module at `site`; raises where keys cannot be added."""
    if attention.computes_alone(site.module):
        raise DeltatuneError(
            f"{site.path} ({type(site.module).__name__}) computes attention by itself, and keys cannot be added there; "
            "prompts, adapters and low-rank methods run on this architecture"
        )
    side: anatomy.Side = "encoder" if group(site) == "encoder" else "decoder"
    return anatomy.kv_heads(site.config, side), anatomy.head_dim(site.config, side)


def width(site: Site) -> int:
    """Width of the residual stream."""
    return anatomy.hidden(site.config)


@dataclass(frozen=True, kw_only=True)
class _Listening(Method):
    at = ("attention",)

    def build(self, site: Site, shared: nn.Module | None) -> _Listener:
        return _Listener()


class _Listener(Intervention):
    only_prepends = True

    def __init__(self) -> None:
        super().__init__()
        self.heard: tuple[Tensor, Tensor] | None = None

    def forward(self, call: Base, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.heard = key, value
        return call(query, key, value, *args, **kwargs)


@torch.no_grad()
def heard(sites: Sequence[Site], ids: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> the keys and values (kv heads, p, head_dim) of p tokens at each site, in the base alone.

    Rotary positions are -p, ..., -1, for tokens that a prefix stands before begin at 0. A decoder beside an encoder
    reads the same tokens."""
    model: Any = sites[0].model
    name, known = "text-of-a-prefix", switch_of(model)
    before = None if known is None else known.current
    modes = [(module, module.training) for module in model.modules()]
    adapter = attach(model, _Listening(targets=tuple({re.escape(s.path): None for s in sites})), name)
    try:
        model.eval()
        with using(model, name):
            cache = _read(getattr(model, "base_model", model), ids)
        found = {path: (unit, module) for path, module, unit, _ in adapter.sites()}
    finally:
        for module, training in modes:
            module.training = training
        detach(model, name)
        if known is not None and before is not None:
            known.current = before
    return {s.path: _own(s, *found[s.path], cache) for s in sites}


def _read(backbone: Any, ids: Sequence[int]) -> Any:
    """The cache of a backbone that has read the tokens, if it keeps one."""
    takes, size = accepted(backbone), getattr(backbone.get_input_embeddings(), "num_embeddings", 0)
    if "input_ids" not in takes or "pixel_values" in takes:
        name = plain_class(type(backbone)).__name__
        raise DeltatuneError(f"init: {name} reads no tokens alone, so no text has keys and values there; use 'normal'")
    if wrong := [i for i in ids if not 0 <= i < size]:
        raise DeltatuneError(f"init: token id {wrong[0]} is not among the {size} of the vocabulary")
    tokens = torch.tensor([ids], device=next(backbone.parameters()).device)
    given: dict[str, Tensor] = {n: tokens for n in ("input_ids", "decoder_input_ids") if n in takes}
    if "position_ids" in takes and any(n.endswith("inv_freq") for n, _ in backbone.named_buffers()):
        given["position_ids"] = torch.arange(-len(ids), 0, device=tokens.device)[None]
    out = backbone(**given, **({"use_cache": True} if "use_cache" in takes else {}))
    return getattr(out, "past_key_values", None)


def _own(site: Site, unit: Any, module: Any, cache: Any) -> tuple[Tensor, Tensor]:
    pair = unit.heard
    if pair is not None and not pair[0].shape[2] and cache is not None:  # attention in the module itself
        layer = cache.layers[module.layer_idx]
        pair = layer.keys, layer.values
    if pair is None:
        raise DeltatuneError(f"init: {site.path} never reads the text, so there are no keys and values; use 'normal'")
    return tuple(t[0].to(**site.like) for t in pair)  # type: ignore[return-value]


def stack(prefixes: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v) of (kv heads, p_i, head_dim) each, `rows` (b,) with -1 for none -> k, v (b, kv heads, p, head_dim), slots
    (b, p). The shorter ones stand on the right, next to the tokens."""
    lengths = [k.shape[1] for k, _ in prefixes]
    p = max(lengths)
    both = [torch.stack([F.pad(t, (0, 0, p - t.shape[1], 0)) for t in pair]) for pair in prefixes]
    kv = torch.stack([*both, torch.zeros_like(both[0])])[rows]
    used = torch.tensor([[i >= p - n for i in range(p)] for n in lengths] + [[False] * p], device=rows.device)
    return kv[:, 0], kv[:, 1], used[rows]


def prepend(call: Base, k: Tensor, v: Tensor, slots: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
            mask: Tensor | None, *, position_bias: Tensor | None = None, **kwargs: Any) -> Any:  # fmt: skip
    """Attention over [k; key], [v; value]; k, v (b or 1, kv heads, p, head_dim), `slots` (b, p): which a row sees."""
    b, p = len(query), k.shape[2]
    if mask is None and (slots is not None or _looks_back(call.module, query, kwargs)):
        n, m = query.shape[2], key.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=key.device)[None, None]
        mask = mask.tril(m - n) if _looks_back(call.module, query, kwargs) else mask
    if mask is not None:
        mask = torch.cat(_same_batch(_columns(mask, p, slots), mask), -1)
    if position_bias is not None:
        kwargs["position_bias"] = F.pad(position_bias, (p, 0))
    key, value = (torch.cat([_as(own, t).expand(b, -1, -1, -1), own], 2) for t, own in ((k, key), (v, value)))
    return call(query, key, value, mask, **kwargs)


def _as(own: Tensor, t: Tensor) -> Tensor:
    """`t` in the precision of `own`, and zero in the widths that a unit around this one has added to its heads."""
    return F.pad(t.to(own.dtype), (0, own.shape[-1] - t.shape[-1]))


def _looks_back(module: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether without a mask the attention function would be causal."""
    causal = kwargs.get("is_causal")
    return query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if causal is None else causal)


def _columns(mask: Tensor, p: int, slots: Tensor | None) -> Tensor:
    """What `mask` (b or 1, ., queries, keys), boolean or additive, says of p added keys."""
    if slots is None:
        return mask.new_ones(*mask.shape[:-1], p) if mask.dtype == torch.bool else mask.new_zeros(*mask.shape[:-1], p)
    seen = slots[:, None, None].expand(-1, *mask.shape[1:-1], -1)
    if mask.dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, torch.finfo(mask.dtype).min)


def _same_batch(*masks: Tensor) -> list[Tensor]:
    b = max(map(len, masks))
    return [m.expand(b, *m.shape[1:]) for m in masks]


def _counts(path: str, module: nn.Module) -> bool:
    """Whether this is a backbone, which holds no other model; a decoder beside an encoder, if it takes positions."""
    if [m for m in module.modules() if isinstance(m, PreTrainedModel)] != [module]:
        return False
    return "position_ids" in accepted(module) or path.rpartition(".")[2] != "decoder"


@dataclass(frozen=True, kw_only=True)
class Positions(Method):
    """Positions that count real tokens: left padding would move the tokens away from keys that have no position."""

    targets: Select = _counts

    at = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> Prompt:
        return Prompt(Layout())


class Flat(nn.Module):
    """`k`, `v` (kv heads, p, head_dim)."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(k), nn.Parameter(v)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


class Prefix(Intervention):
    """`source()` -> P_k, P_v (kv heads, p, head_dim)."""

    only_prepends = True  # so it runs where attention is computed in the module, too

    def __init__(self, source: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.source, self.dropout = source, nn.Dropout(dropout)

    def forward(self, call: Base, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        k, v = (self.dropout(t.expand(len(query), -1, -1, -1)) for t in self.source())
        return prepend(call, k, v, None, query, key, value, mask, **kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        return prepend(call, *stack([(*map(u.dropout, u.source()),) for u in units], rows), *args, **kwargs)

    @torch.no_grad()
    def flatten(self) -> None:
        if not isinstance(self.source, Flat):
            self.source = Flat(*(t.clone() for t in self.source()))
