"""deltatune: fit any parameter-efficient method to a frozen base model, train it, prove it, merge it, serve it.

    import deltatune as dt
    law = dt.attach(model, dt.LoRA(r=16, init=dt.PiSSA()), "law")
"""

from typing import Any

from deltatune import models as _models
from deltatune import registry as _registry
from deltatune.core import (
    Adapter,
    DeltatuneError,
    Fused,
    Layers,
    Part,
    PerRow,
    Union,
    activate,
    adapters,
    attach,
    detach,
    load,
    merge,
    plan,
    unmerge,
    using,
)

_METHODS: dict[str, type] = {n: c for p in _registry.PACKAGES for n, c in _registry.public(p).items()}
globals().update(_METHODS)


def methods() -> dict[str, type]:
    """Every method, init, router and callback, by the name that its paper gives it."""
    return dict(_METHODS)


def save(adapter: Adapter, folder: str) -> Any:
    """Write `adapter` to `folder`: see `Adapter.save`."""
    return adapter.save(folder)


__all__ = [
    "Adapter", "DeltatuneError", "Fused", "Layers", "Part", "PerRow", "Union", "activate", "adapters", "attach",
    "detach", "load", "merge", "methods", "plan", "save", "unmerge", "using", *_METHODS,
]  # fmt: skip
