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
from deltatune.core.units import Base
from deltatune.models import anatomy, attention
from deltatune.models.calls import accepted
from deltatune.models.prompting import Layout, Prompt

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
    key, value = (torch.cat([t.to(own.dtype).expand(b, -1, -1, -1), own], 2) for t, own in ((k, key), (v, value)))
    return call(query, key, value, mask, **kwargs)


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
