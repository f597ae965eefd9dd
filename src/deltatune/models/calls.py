"""Calls of transformers' modules, by the names of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deltatune.storage.layers import plain_class

_NAMES: dict[type[Any], tuple[str, ...]] = {}  # a table and no cached call, which torch.compile cannot trace


def accepted(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's own forward, `self` aside."""
    cls = plain_class(type(module))
    if cls not in _NAMES:
        _NAMES[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _NAMES[cls]


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(accepted(module), args, strict=False)), **kwargs}
