"""Soft prompts: vectors that stand before (or among) the embedded tokens of a backbone, whatever the architecture.

The backbone is called with `inputs_embeds`, mask, positions and token types that hold the prompt too, and its output is
cut back to the tokens: heads, labels and pooling never learn of it. With a key-value cache the prompt goes in while the
cache is empty; later the masks and positions count it, and callers go on passing those of the tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.errors import DeltatuneError
from deltatune.core.method import Method, Site
from deltatune.core.select import resolve, walk
from deltatune.core.units import Base, Intervention
from deltatune.kernels.attention import Blocks
from deltatune.models.anatomy import ANATOMY, parts
from deltatune.models.blocks import told
from deltatune.models.calls import accepted, arguments
from deltatune.storage.layers import plain_class

CLASSIFIERS = ("bert", "roberta", "deberta-v2", "distilbert")  # their first token, [CLS], is read by a pooler


@dataclass(frozen=True, kw_only=True)
class Positioned(Method):
    """A method whose file says which `positions` its adapters were trained with: other ones would be another model.

    "counted": the vectors of a prompt have positions as tokens do. "kept": tokens have those that they have alone."""

    positions: str = "counted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != (known := type(self).positions):
            raise DeltatuneError(
                f"{type(self).__name__}: adapter_config.json, or a recipe, has positions = {self.positions!r}, and "
                f"here they are {known!r}, so the outputs would differ; train it anew, or run it where it was trained"
            )


@dataclass(frozen=True)
class Layout:
    """Where a prompt lies among the tokens of a backbone.

    after: the number of tokens before it, 1 for those that begin with [CLS]. causal: whether queries only look back.
    whole: whether the output keeps the prompt's states, as those of an encoder must for cross-attention.
    """

    after: int = 0
    causal: bool = True
    whole: bool = False


def layout(site: Site) -> Layout:
    """That of the backbone at `site`; raises DeltatuneError if it does not take embedded tokens."""
    module, kind = site.module, str(getattr(site.config, "model_type", None))
    if "inputs_embeds" not in accepted(module):
        name = plain_class(type(module)).__name__
        raise DeltatuneError(f"{site.path or 'the model'} ({name}) takes no embedded tokens, so it cannot be prompted")
    if kind in CLASSIFIERS and not getattr(site.config, "is_decoder", False):
        return Layout(after=1, causal=False)
    encoder = kind in ANATOMY and ANATOMY[kind].encoder is not None
    return Layout(causal=not encoder, whole=encoder and "decoder" in parts(site.model))


def embeddings(module: Any) -> nn.Module:
    """Token ids -> the vectors that the backbone begins with, the architecture's scaling included."""
    return module.get_input_embeddings()


def embedding_path(model: nn.Module) -> str:
    """Where the backbone's embeddings are, an encoder-decoder's encoder's; raises if it takes no embedded tokens."""
    match = resolve(model, None, ("backbone",))[0]
    layout(Site(model, match.path, match.module, "call"))
    own = embeddings(match.module)
    return next(path for path, module in walk(model) if module is own)


def stack(prompts: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (p_i, d), `rows` (b,) with -1 for none -> (b, p, d) with the shorter ones on the right, slots (b, p)."""
    p = max(map(len, prompts))
    padded = [F.pad(x, (0, 0, p - len(x), 0)) for x in prompts]
    used = torch.tensor([[i >= p - len(x) for i in range(p)] for x in prompts] + [[False] * p], device=rows.device)
    return torch.stack([*padded, torch.zeros_like(padded[0])])[rows], used[rows]


def arrange(at: Layout, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """slots (b, p), mask (b, n) -> for p + n places: what may be seen, the order [prompt; tokens] is put in, and which
    tokens (b, n) come after the prompt.

    A row becomes [padding; (CLS); prompt; tokens]. Unused slots go where no position is shifted: to the left padding
    of causal models, and to the end of encoders.
    """
    real = mask.bool()
    lead = real.cumsum(1)
    behind = lead > at.after
    place = torch.where(behind, 3, torch.where(lead > 0, 1, 0))
    order = torch.cat([torch.where(slots, 2, 0 if at.causal else 4), place], 1).argsort(dim=1, stable=True)
    return torch.cat([slots.to(mask.dtype), mask], 1).gather(1, order), order, behind


def positions(module: nn.Module, mask: Tensor) -> Tensor:
    """mask (b, n) -> (b, n): how many of its row's real tokens come before each."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) + _first(module)


def _first(module: nn.Module) -> int:
    """The first position: RoBERTa's table begins after the padding token's number."""
    own: Any = getattr(module, "embeddings", None)
    return own.padding_idx + 1 if hasattr(own, "create_position_ids_from_inputs_embeds") else 0


def prompted(at: Layout, call: Any, prompt: Tensor | None, slots: Tensor | None, args: Any, kwargs: Any) -> Any:
    """`call` a backbone with `prompt` (b or 1, p, d) in place; `slots` (b, p): what of it a row has, None for all."""
    module, a = call.module, arguments(call.module, args, kwargs)
    mask, own = a.get("attention_mask"), a.get("position_ids")
    counts = own is None and "position_ids" in accepted(module)
    tokens = next((a[n] for n in ("input_ids", "inputs_embeds") if a.get(n) is not None), None)
    if prompt is None or tokens is None:
        if counts and tokens is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            a["position_ids"] = positions(module, mask)[:, -tokens.shape[1] :]
        return call(**a)
    past = a.get("past_key_values")
    seen = 0 if past is None else past.get_seq_length()
    (b, n), p = tokens.shape[:2], prompt.shape[1]
    _refuse(module, mask, None if seen else own, p, n, seen, past is not None)
    if mask is None and (slots is not None or at.after or (own is not None and not seen)):
        mask = torch.ones(b, n + (seen - p if seen else 0), dtype=torch.long, device=tokens.device)
    order = behind = None
    if mask is not None:
        slots = torch.ones(b, p, dtype=torch.bool, device=tokens.device) if slots is None else slots
        a["attention_mask"], order, behind = arrange(at, slots, mask)
    if own is not None:
        shift = p if slots is None else slots.sum(1, keepdim=True)
        if not seen:
            assert slots is not None and behind is not None and order is not None  # there is a mask
            before = (slots.cumsum(1) - 1 + at.after).clamp(min=0) + _first(module)
            own = torch.cat([before, own.expand(b, -1) + shift * behind], 1).gather(1, order)
        a["position_ids"] = own if not seen else own + shift
    elif mask is not None and counts:
        a["position_ids"] = positions(module, a["attention_mask"])[:, -n if seen else 0 :]
    if seen:
        return call(**a)
    x = a["inputs_embeds"] if a.get("inputs_embeds") is not None else embeddings(module)(a["input_ids"])
    x = torch.cat([prompt.to(x.dtype).expand(b, -1, -1), x], 1)
    if (types := a.get("token_type_ids")) is not None:
        types = torch.cat([types[:, :1].expand(-1, p), types], 1)
        a["token_type_ids"] = types if order is None else types.expand(b, -1).gather(1, order)
    a |= {"input_ids": None, "inputs_embeds": x if order is None else x.take_along_dim(order[..., None], 1)}
    out = call(**a)
    places = torch.arange(p + n, device=x.device)[None] if order is None else order.argsort(1)
    return out if at.whole else _cut(out, p + n, places[:, p:])


def _refuse(module: nn.Module, mask: Any, own: Tensor | None, p: int, n: int, seen: Any, cached: bool) -> None:
    name = plain_class(type(module)).__name__
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise DeltatuneError(
            f"a prompt before {name} needs an attention_mask of one number a token, (batch, tokens); this one is made "
            "for fixed places (packed rows, a static cache): leave it out, or use a dynamic cache"
        )
    if mask is not None and seen and mask.shape[1] + p > seen + n:
        raise DeltatuneError(
            f"attention_mask counts {mask.shape[1]} tokens, but cache and call hold {seen + n - p} beside the prompt "
            f"of {p}: go on from a cache by passing all its tokens' mask and only the new tokens"
        )
    if mask is not None and cached and not seen and not torch.compiler.is_compiling() and not mask.any(1).all():
        raise DeltatuneError(
            f"a row of the first tokens before {name} is padding alone, so its prompt has no place yet; pad less, or "
            "make `prefill_chunk_size` longer than the padding"
        )
    if own is not None and own.shape[1] > 1 and not torch.compiler.is_compiling():
        real = torch.ones_like(own, dtype=torch.bool) if mask is None else mask.bool()
        if bool(((own[:, 1:] <= own[:, :-1]) & real[:, 1:] & real[:, :-1]).any()):
            raise DeltatuneError(
                f"position_ids restart within a row: only the first of the packed documents would see the prompt "
                f"before {name}; train prompts on padded rows, without packing"
            )


def _cut(out: Any, length: int, places: Tensor) -> Any:
    """The tokens' part of whatever a backbone returns: states (b, length, d), attentions (b, heads, length, keys)."""
    if isinstance(out, Tensor):
        if out.ndim == 3 and out.shape[1] == length:
            return out.take_along_dim(places[..., None], 1)
        return out.take_along_dim(places[:, None, :, None], 2) if out.ndim == 4 and out.shape[2] == length else out
    if isinstance(out, tuple):
        return tuple(_cut(o, length, places) for o in out)
    if isinstance(out, dict):
        for key, value in out.items():
            out[key] = _cut(value, length, places)
    return out


class Vectors(Intervention):
    """Vectors that stand for tokens: `prompt` (p, d) itself, or what the network `source` makes in its place."""

    roles = {"prompt": "prompt"}

    def __init__(self, start: Tensor | nn.Module | None) -> None:
        super().__init__()
        self.register_parameter("prompt", nn.Parameter(start) if isinstance(start, Tensor) else None)
        self.source = start if isinstance(start, nn.Module) else None

    def vectors(self) -> Any:
        return self.prompt if self.source is None else self.source()

    def flatten(self) -> None:
        if self.source is not None:
            self.prompt, self.source = nn.Parameter(self.source().clone()), None


class Prompt(Vectors):
    """Vectors before a backbone's tokens. With none, only the positions of its tokens come from the mask."""

    lengthens = True

    def __init__(self, at: Layout, start: Tensor | nn.Module | None = None) -> None:
        super().__init__(start)
        self.at = at

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        own = self.vectors()
        return prompted(self.at, call, None if own is None else own[None], None, args, kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        own = [u.vectors() for u in units]
        if (i := next((i for i, x in enumerate(own) if x is not None), None)) is None:
            return units[0](call, *args, **kwargs)
        prompts, slots = stack([own[i][:0] if x is None else x for x in own], rows)
        return prompted(units[i].at, call, prompts, slots, args, kwargs)


class Placed(Vectors):
    """At an embedding: the i-th `token` of a row, or of a document in it whose layout is told, is vector i mod p; the
    other tokens are as they were."""

    def __init__(self, token: int, start: Tensor | nn.Module) -> None:
        super().__init__(start)
        self.token = token

    def forward(self, call: Base, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, own, here = call(ids, *args, **kwargs), self.vectors(), ids == self.token
        count = here.cumsum(-1)
        blocks = None if torch.compiler.is_compiling() else told()  # a model is compiled whole for plain rows alone
        count, each = (count, count[..., -1]) if blocks is None else _by_document(count, blocks)
        if not torch.compiler.is_compiling() and bool((wrong := each % len(own) > 0).any()):
            raise DeltatuneError(
                f"a row has {int(each[wrong][0])} tokens {self.token}, which stand for {len(own)} pseudo-tokens: each "
                "template holds that many, and neither a row's cut nor a chunk of it splits them"
            )
        return torch.where(here[..., None], own.to(x.dtype)[(count - 1).clamp(min=0) % len(own)], x)


def _by_document(count: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """`count` (1, T) along a row -> the same along each document, what it shares before it; and each document's all."""
    ends = F.pad(count, (1, 0))[:, torch.tensor([blocks.shared, *blocks.lengths], device=count.device).cumsum(0)]
    others = F.pad(ends[:, :-1] - ends[:, :1], (1, 0))  # those of the documents between the shared tokens and this one
    return count - others[:, blocks.documents.to(count.device)], (ends - others)[:, 1:]
