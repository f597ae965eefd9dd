"""The place "attention": around the attention function that transformers looks up by name and calls with the module.

Keys and values arrive there after rotary embedding and after the cache update. While an adapter is at work there, the
model's attention implementation is called `deltatune_…`: it consults the module's slot, then runs the one that was
configured. Masks are always made in full, so that a unit that adds keys can widen them. Bloom, Falcon and GPT-J compute
attention in the module: there, units that do nothing but prepend keys and values (`only_prepends`) run all the same.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.core.errors import DeltatuneError
from deltatune.core.select import SLOT
from deltatune.core.surgery import register_point
from deltatune.storage.layers import plain_class

PREFIX = "deltatune_"
INLINE = ("BloomAttention", "FalconAttention", "GPTJAttention")  # attention in the module itself: keys can be prepended
CLOSED = ("DisentangledSelfAttention", "MptAttention", "CodeGenAttention")  # there they cannot
_ALONE = ("bloom", "falcon", "gptj", "deberta-v2", "mpt", "codegen")  # model types that never look the function up


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, _configured: str,
            **kwargs: Any) -> Any:  # fmt: skip
    """query (b, heads, q, d), key and value (b, kv heads, k, d), mask (b, 1, q, k) -> ((b, q, heads, d), weights)."""
    eager: Any = sys.modules[layers_module(type(module))].__dict__.get("eager_attention_forward")
    configured = partial(ALL_ATTENTION_FUNCTIONS.get_interface(_configured, eager), module)
    slot = module._modules.get(SLOT)
    if slot is None:
        return configured(query, key, value, mask, **kwargs)
    return slot.run(module, configured, (query, key, value, mask), kwargs, attention=True)  # type: ignore[operator]


def layers_module(cls: type) -> str:
    """The module in which a (possibly grafted) class was written."""
    return plain_class(cls).__module__


def computes_alone(module: nn.Module) -> bool:
    """Whether this attention module offers no place for more keys."""
    return plain_class(type(module)).__name__ in CLOSED


def looks_up(module: nn.Module) -> bool:
    """Whether this attention module takes its function from transformers' table, so that units can surround it."""
    return plain_class(type(module)).__name__ not in (*INLINE, *CLOSED)


class Prefixed:
    """A cache, or none, whose answers begin with keys and values that it does not hold."""

    def __init__(self, cache: Any, key: Tensor, value: Tensor) -> None:
        self.cache, self.key, self.value = cache, key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        pairs = ((self.key, key), (self.value, value))
        k, v = (torch.cat([more.to(own.dtype).expand(len(own), -1, -1, -1), own], 2) for more, own in pairs)
        return k, v


def _inline(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before an attention module of `INLINE`: its units run on no keys at all, and what they prepend is handed in
    through the cache, the mask and ALiBi, which for p keys before position 0 says slope * (-p, ..., -1)."""
    slot = module._modules.get(SLOT)
    units = [u for n in slot.switch.active().names for u, _ in slot.at(n, True)] if slot is not None else []
    if not units:
        return None
    name = plain_class(type(module)).__name__
    if other := next((u for u in units if not getattr(u, "only_prepends", False)), None):
        raise DeltatuneError(f"{type(other).__name__} changes the attention function, which {name} computes by itself")
    hidden, mask, alibi = args[0] if args else kwargs["hidden_states"], kwargs["attention_mask"], kwargs.get("alibi")
    (b, n), heads = hidden.shape[:2], getattr(module, "num_heads", None) or module.num_attention_heads
    kv = heads if getattr(module, "new_decoder_architecture", True) else module.num_kv_heads
    none = hidden.new_empty(b, kv, 0, module.head_dim)
    given = hidden.new_empty(b, heads, n, module.head_dim), none, none, mask[..., :0]
    key, value, more = slot.run(module, lambda q, k, v, m, **_: (k, v, m), given, {}, attention=True)
    p = key.shape[2]
    if alibi is not None:
        build = sys.modules[layers_module(type(module))].__dict__["build_alibi_tensor"]
        slope = build(torch.ones(1, 2, device=hidden.device), heads, alibi.dtype)[:, :, 1:]
        below = (slope * torch.arange(-p, 0, device=hidden.device)).to(alibi.dtype)[None]  # (1, heads, 1, p)
        kwargs["alibi"] = torch.cat([below.expand(b, -1, -1, -1).reshape(*alibi.shape[:-1], p), alibi], -1)
        if name == "FalconAttention":  # its mask holds ALiBi as well
            more = more.expand(b, -1, -1, -1) + below / math.sqrt(module.head_dim)
    mask = torch.cat([more, mask.expand(*more.shape[:-1], -1)], -1)
    return args, kwargs | {"attention_mask": mask, "layer_past": Prefixed(kwargs.get("layer_past"), key, value)}


def _mask(*args: Any, _configured: str, **kwargs: Any) -> Any:
    kwargs |= {k: False for k in ("allow_is_causal_skip", "allow_is_bidirectional_skip") if k in kwargs}
    return ALL_MASK_ATTENTION_FUNCTIONS[_configured](*args, **kwargs)


for _name in ("eager", "sdpa"):
    AttentionInterface.register(PREFIX + _name, partial(_attend, _configured=_name))
    AttentionMaskInterface.register(PREFIX + _name, partial(_mask, _configured=_name))


class AttentionPoint:
    def install(self, model: nn.Module) -> None:
        for module in model.modules():
            if plain_class(type(module)).__name__ in INLINE:
                module.register_forward_pre_hook(_inline, with_kwargs=True)
        for config in configs(model):
            now = config._attn_implementation
            if config.model_type not in _ALONE and not str(now).startswith(PREFIX):
                if PREFIX + str(now) not in ALL_ATTENTION_FUNCTIONS:
                    raise DeltatuneError(
                        f"adapters at the attention function run with attn_implementation 'sdpa' or 'eager', "
                        f"not {now!r}"
                    )
                config._attn_implementation_internal = PREFIX + now

    def remove(self, model: nn.Module) -> None:
        for config in configs(model):
            config._attn_implementation_internal = str(config._attn_implementation).removeprefix(PREFIX)
        for module in model.modules():
            for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _inline]:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def configs(model: nn.Module) -> list[Any]:
    """The model's configuration, and those of the models inside it."""
    configs = (getattr(m, "config", None) for m in model.modules())
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


register_point("attention", AttentionPoint())
