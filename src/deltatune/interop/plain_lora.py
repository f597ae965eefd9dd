"""LoRA as the rest of the world holds it, W' = W + s B A, from one that started elsewhere.

    s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]                                           factors of twice the rank

PiSSA, OLoRA, CorDA and LoRA-GA start at a product B0 A0, which is taken off so that W' = W. Files in PEFT's layout hold
such an adapter in this form; `plain_lora` does the same on the model.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch

from deltatune.core import Adapter, DeltatuneError, Method, attach, detach
from deltatune.methods.lora import LoRA, taken_off


@torch.no_grad()
def plain_lora(adapter: Adapter, name: str) -> Adapter:
    """Attach the ordinary LoRA that `adapter` is equal to, of twice its rank, as `name`, and activate it.

    Raises DeltatuneError, and leaves the model as it was, when nothing is taken off, or a method around it takes no
    LoRA of another rank."""
    state = adapter.state_dict()
    starts = [key.removesuffix("a0") for key in state if key.endswith(".a0")]
    if not starts:
        raise DeltatuneError(f"adapter {adapter.name!r} has no start that is taken off: what LoRA it holds is ordinary")
    for key in starts:
        a, b, a0, b0 = (state.pop(f"{key}{n}") for n in ("a", "b", "a0", "b0"))
        state[f"{key}b"], state[f"{key}a"] = taken_off(a, b, a0, b0)
    twin = attach(adapter.model, _plain(adapter.method), name, dtype=adapter.dtype)
    try:
        twin.load_state_dict(state)
    except DeltatuneError:
        detach(adapter.model, name)
        raise
    return twin


def _plain(method: Any) -> Any:
    """With LoRAs of twice the rank under the same scaling in place of those with an `init`."""
    if isinstance(method, LoRA) and method.init is not None:
        more = 2 if method.scaling == "alpha/r" else math.sqrt(2)
        ranks, alphas = {k: 2 * r for k, r in method.ranks.items()}, {k: more * v for k, v in method.alphas.items()}
        return replace(method, r=2 * method.r, alpha=more * method.alpha, ranks=ranks, alphas=alphas, init=None)
    if isinstance(method, tuple):
        return tuple(map(_plain, method))
    if not isinstance(method, Method):
        return method
    return replace(method, **{f.name: _plain(getattr(method, f.name)) for f in fields(method)})
