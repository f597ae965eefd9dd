"""The device that tensors are for. Those on "meta" are shapes alone, and stand for tensors of a device of some kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_META: ContextVar[str] = ContextVar("meta", default="cpu")


def kind(t: Tensor) -> str:
    """The type of the device that `t` is for."""
    return _META.get() if t.is_meta else t.device.type


@contextmanager
def standing_for(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors on "meta" are for devices of this kind, where autocast makes products of `dtype`.

    The kind of device itself need not be there."""
    token, before = _META.set(kind), (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    torch.set_autocast_enabled(kind, dtype is torch.bfloat16)
    torch.set_autocast_dtype(kind, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])
        _META.reset(token)
