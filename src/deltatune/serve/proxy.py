"""Tuning Language Models by Proxy. Liu, Han, Wang, Tsvetkov, Choi, Smith; COLM 2024; arXiv 2401.08565.

A large model M answers as if it had been tuned, by what tuning did to a small one of the same vocabulary V: at every
step, with logits l (b, V),

    l = l_M + alpha (l_M+ - l_M-)          so that          p ~ p_M (p_M+ / p_M-)^alpha

M+, the expert, is the small model under an adapter; M-, the anti-expert, is the same weights without it. Both are the
rows of one batch, so a step is one forward of M and one of the small model, each with its own cache. Nothing is trained
and M's weights are never read: penalties, temperature and top-p are transformers' own, on the mixed logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltatune.core import DeltatuneError, adapters, nearest, using
from deltatune.models.calls import accepted
from deltatune.routers.per_row import PerRow

# decoding that reorders a cache, or calls M for other than the next token
_REFUSED = {"num_beams": 1, "assistant_model": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
            "prefill_chunk_size": None, "guidance_scale": 1, "custom_generate": None}  # fmt: skip


@dataclass(frozen=True)
class ProxyTuning:
    """`base` tuned by proxy: `small` with its attached adapter `expert`, less `small` alone, times `alpha`.

    Raises DeltatuneError unless every token of the base's tokenizer has the same number in the small model's, which
    may have more: these are cut off the expert's logits.
    """

    base: PreTrainedModel
    small: PreTrainedModel
    expert: str
    tokenizer: PreTrainedTokenizerBase
    small_tokenizer: PreTrainedTokenizerBase
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for model in (self.base, self.small):
            if model.config.is_encoder_decoder or not model.can_generate():
                kind = "an encoder-decoder" if model.config.is_encoder_decoder else "without a language model's head"
                raise DeltatuneError(f"ProxyTuning: {type(model).__name__} is {kind}; it takes decoder-only models")
        if self.expert not in (known := adapters(self.small)):
            there = nearest(self.expert, known, 1) or f"; attached: {', '.join(known) or 'none'}"
            raise DeltatuneError(f"ProxyTuning: the small model has no adapter {self.expert!r}{there}")
        if not math.isfinite(self.alpha):
            raise DeltatuneError(f"ProxyTuning: alpha = {self.alpha} is not a finite number")
        own, small = self.tokenizer.get_vocab(), self.small_tokenizer.get_vocab()
        if differing := sorted((i, token) for token, i in own.items() if small.get(token) != i):
            i, token = differing[0]
            raise DeltatuneError(
                f"ProxyTuning: the tokenizers differ in {len(differing)} tokens: {token!r} is {i} in the base's and "
                f"{small.get(token, 'missing')} in the small model's; take a small model of the base's family"
            )
        if (rows := len(self.small.get_input_embeddings().weight)) <= (last := max(own.values())):  # type: ignore[arg-type]
            raise DeltatuneError(f"ProxyTuning: the small model embeds {rows} tokens, the tokenizers know {last + 1}")

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                 expert: Mapping[str, Tensor] | None = None, **options: Any) -> Any:  # fmt: skip
        """`base.generate(input_ids, attention_mask, **options)` under the mixed logits, greedy or sampled.

        input_ids (b, n), attention_mask (b, n), padded on the left: the prompts of M and of M-. expert: `input_ids`
        (b, m) and `attention_mask` of the prompts of M+, where they are others, in a template of its own.
        """
        config = options.get("generation_config") or self.base.generation_config
        asked = {name: options.get(name, getattr(config, name, None)) for name in _REFUSED}
        if name := next((n for n, usual in _REFUSED.items() if asked[n] not in (None, usual)), None):
            raise DeltatuneError(
                f"ProxyTuning: {name} = {asked[name]!r} is not supported; it decodes greedily or samples"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        theirs = {"input_ids": input_ids, "attention_mask": mask} if expert is None else dict(expert)
        prompts = (theirs["input_ids"], input_ids)
        masks = (theirs.get("attention_mask", torch.ones_like(theirs["input_ids"])), mask)
        if len(prompts[0]) != len(prompts[1]):
            raise DeltatuneError(
                f"ProxyTuning: {len(prompts[0])} prompts of the expert for {len(prompts[1])} of the base"
            )
        if not all(bool(m[:, -1].all()) for m in masks):
            raise DeltatuneError("ProxyTuning: prompts end in padding; pad them on the left, as generation needs")
        times = options.get("num_return_sequences", config.num_return_sequences) or 1
        cached = options.get("use_cache", config.use_cache) is not False
        pair = _Pair(self.small, self.expert, _stacked(prompts, times), _stacked(masks, times), cached)
        thread = get_ident()

        def mix(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            if pair.running or get_ident() != thread:  # another's call of the base, or the small model is the base
                return
            shift = pair.difference(kwargs["input_ids"][:, -1:])
            logits = out.logits[:, -1:].float()  # the vocabularies may differ in what no tokenizer names
            out.logits = logits + self.alpha * F.pad(shift, (0, logits.shape[-1] - shift.shape[-1])).to(logits.device)

        handle = self.base.register_forward_hook(mix, with_kwargs=True)
        try:
            return self.base.generate(input_ids, attention_mask=mask, **options)  # type: ignore[operator]
        finally:
            handle.remove()


def _stacked(pair: tuple[Tensor, Tensor], times: int) -> Tensor:
    """(b, m), (b, n) -> (2 b times, max(m, n)), padded by 0 on the left, each row `times` over."""
    width = max(t.shape[1] for t in pair)
    return torch.cat([F.pad(t, (width - t.shape[1], 0)).repeat_interleave(times, 0) for t in pair])


@dataclass
class _Pair:
    """M+ and M- as the halves of one batch: `ids` (2b, n) of the tokens so far, `mask` (2b, n), and their cache."""

    small: Any
    expert: str
    ids: Tensor
    mask: Tensor
    cached: bool
    cache: Any = None
    running: bool = False
    begun: bool = False

    def difference(self, token: Tensor) -> Tensor:
        """(b, 1, V): l_M+ - l_M- after the prompts, in the first call, and after one more `token` (b, 1) in others."""
        if self.begun:
            self.ids = torch.cat([self.ids, token.repeat(2, 1)], 1)
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        new = 1 if self.begun and self.cached else self.ids.shape[1]
        places = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        given = {
            "input_ids": self.ids[:, -new:], "attention_mask": self.mask, "position_ids": places[:, -new:],
            "past_key_values": self.cache, "use_cache": self.cached, "logits_to_keep": 1,
        }  # fmt: skip
        known, device = accepted(self.small), self.small.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items() if k in known}
        half = len(self.ids) // 2
        self.running = True
        try:
            with using(self.small, router=PerRow([self.expert] * half + [None] * half)):
                out = self.small(**given)
        finally:
            self.running = False
        self.begun, self.cache = True, out.past_key_values if self.cached else None
        expert, other = out.logits[:, -1:].float().chunk(2)
        return expert - other
