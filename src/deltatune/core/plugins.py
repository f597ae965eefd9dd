"""What core must know of the world, imported when it is first needed, so that core itself needs only torch."""

from __future__ import annotations

import importlib
import sys

PLUGINS = ("deltatune.models", "deltatune.interop")  # architectures and layer types; foreign file formats
QUANTISED = {"bitsandbytes": "deltatune.storage.bitsandbytes", "torchao": "deltatune.storage.torchao"}


def load_plugins() -> None:
    """All plugins; of the quantised storages those whose library is imported, as it is if a model has its layers."""
    for name in (*PLUGINS, *(storage for library, storage in QUANTISED.items() if library in sys.modules)):
        importlib.import_module(name)


def load_types() -> None:
    """All methods, inits, callbacks and routers: a file may name one that this process has not used."""
    importlib.import_module("deltatune.registry").found()
