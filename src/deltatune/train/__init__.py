"""Training: a recipe, the loop that runs it, and the memory that it needs.

`deltatune.train` is this package and can be called: `deltatune.train(model, adapter, "rows.jsonl", epochs=2)`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOMES = {"train": "run", "run": "run", "prepare": "run", "Outcome": "run", "Recipe": "recipe", "fit": "loop",
          "Result": "loop", "TrainOptions": "options", "Estimate": "memory", "estimate": "memory"}  # fmt: skip
__all__ = ["Estimate", "Outcome", "Recipe", "Result", "TrainOptions", "estimate", "fit", "prepare", "run", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Train(ModuleType):
    """`import deltatune.train` puts this module where `deltatune.train(…)` looks, and its `run` is the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "run" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module(f"{__name__}.run").train(*args, **options)


sys.modules[__name__].__class__ = _Train
