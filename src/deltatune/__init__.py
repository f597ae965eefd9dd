"""deltatune: fit any parameter-efficient method to a frozen base model, train it, prove it, merge it, serve it.

    import deltatune as dt
    law = dt.attach(model, dt.LoRA(r=16, init=dt.PiSSA()), "law")

Names are looked up when they are first used, so that a command that needs no tensor does not load torch.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

_CORE = (
    "Adapter", "DeltatuneError", "Fused", "Layers", "Part", "Union", "activate", "adapters", "attach", "detach",
    "flatten", "initialise", "load", "merge", "plan", "save", "unmerge", "using",
)  # fmt: skip
_PACKAGES = (
    "callbacks",
    "cli",
    "core",
    "data",
    "inits",
    "interop",
    "methods",
    "models",
    "registry",
    "routers",
    "serve",
    "storage",
    "train",
)


@cache
def _found() -> dict[str, type]:
    return importlib.import_module("deltatune.registry").found()


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"deltatune.{name}")
    if name in _CORE:
        return getattr(importlib.import_module("deltatune.core"), name)
    if name == "ProxyTuning":
        return importlib.import_module("deltatune.serve").ProxyTuning
    if name == "__all__":
        return sorted((*_CORE, "ProxyTuning", "methods", "train", *_found()))
    if name.startswith("_") or name not in _found():
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    return _found()[name]


def __dir__() -> list[str]:
    return __getattr__("__all__")
