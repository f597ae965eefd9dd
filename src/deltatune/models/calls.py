"""Calls of transformers' modules, by the names of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from torch import nn

from deltatune.storage.layers import plain_class


def accepted(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's own forward, `self` aside."""
    return _accepted(cast(Hashable, plain_class(type(module))))


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(accepted(module), args, strict=False)), **kwargs}


@cache
def _accepted(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]
