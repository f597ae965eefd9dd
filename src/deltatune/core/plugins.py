"""What core must know of the world, imported when it is first needed, so that core itself needs only torch."""

from __future__ import annotations

import importlib
from functools import cache

PLUGINS = ("deltatune.models", "deltatune.interop")  # architectures and layer types; foreign file formats


@cache
def load_plugins() -> None:
    for name in PLUGINS:
        importlib.import_module(name)
