"""The place "attention": around the attention function that transformers looks up by name and calls with the module.

Keys and values arrive there after rotary embedding and after the cache update. While an adapter is at work there, the
model's attention implementation is called `deltatune_…`: it consults the module's slot, then runs the one that was
configured. Masks are always made in full, so that a unit that adds keys can widen them.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.core.errors import DeltatuneError
from deltatune.core.select import SLOT
from deltatune.core.surgery import register_point

PREFIX = "deltatune_"
INLINE = ("bloom", "falcon", "gptj", "deberta-v2", "mpt", "codegen")  # attention computed in the module itself


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, _configured: str,
            **kwargs: Any) -> Any:  # fmt: skip
    """query (b, heads, q, d), key and value (b, kv heads, k, d), mask (b, 1, q, k) -> ((b, q, heads, d), weights)."""
    eager = sys.modules[layers_module(type(module))].__dict__.get("eager_attention_forward")
    configured = partial(ALL_ATTENTION_FUNCTIONS.get_interface(_configured, eager), module)
    slot = module._modules.get(SLOT)
    if slot is None:
        return configured(query, key, value, mask, **kwargs)
    return slot.run(module, configured, (query, key, value, mask), kwargs, attention=True)  # type: ignore[operator]


def layers_module(cls: type) -> str:
    """The module in which a (possibly grafted) class was written."""
    return getattr(cls, "plain_class", cls).__module__


def _mask(*args: Any, _configured: str, **kwargs: Any) -> Any:
    kwargs |= {k: False for k in ("allow_is_causal_skip", "allow_is_bidirectional_skip") if k in kwargs}
    return ALL_MASK_ATTENTION_FUNCTIONS[_configured](*args, **kwargs)


for _name in ("eager", "sdpa"):
    AttentionInterface.register(PREFIX + _name, partial(_attend, _configured=_name))
    AttentionMaskInterface.register(PREFIX + _name, partial(_mask, _configured=_name))


class AttentionPoint:
    def install(self, model: nn.Module) -> None:
        for config in _configs(model):
            now = config._attn_implementation
            if config.model_type not in INLINE and not str(now).startswith(PREFIX):
                if PREFIX + str(now) not in ALL_ATTENTION_FUNCTIONS:
                    raise DeltatuneError(
                        f"adapters at the attention function run with attn_implementation 'sdpa' or 'eager', not {now!r}"
                    )
                config._attn_implementation_internal = PREFIX + now

    def remove(self, model: nn.Module) -> None:
        for config in _configs(model):
            config._attn_implementation_internal = str(config._attn_implementation).removeprefix(PREFIX)


def _configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


register_point("attention", AttentionPoint())
