"""Rows of one batch with adapters of their own: what a server of many adapters runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.core import Base, DeltatuneError, Intervention, Router


class PerRow(Router):
    """Each row of the batch names its adapter: `PerRow(["law", "style", None])`; None is the base alone.

    A batch may also hold a multiple of the rows, as beam search and flattened tokens do; it is split evenly.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        super().__init__()
        self.names = tuple(names)

    def index(self, adapters: Sequence[str | None], x: Tensor) -> Tensor:
        """(batch,): the position in `adapters` of each row's name, -1 for a name that is not there."""
        times, rest = divmod(x.shape[0], len(self.names))
        if rest or not times:
            raise DeltatuneError(f"PerRow names {len(self.names)} rows; this call's batch has {x.shape[0]}")
        at = [adapters.index(n) if n in adapters else -1 for n in self.names]
        return torch.tensor(at, device=x.device).repeat_interleave(times)

    def route(self, names: Sequence[str], units: Mapping[str, Sequence[Intervention]], bind: Callable[..., Base],
              args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # fmt: skip
        names, base = list(units), bind()
        kinds = {type(u) for n in names for u in units[n]}
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim]
        index = self.index(names, tensors[0])
        if len(kinds) == 1 and all(len(units[n]) == 1 for n in names):
            done = kinds.pop().batched([units[n][0] for n in names], index, base, *args, **kwargs)
            if done is not NotImplemented:
                return done
        places, parts = [], []
        for i, call in [(-1, base), *((i, bind(n)) for i, n in enumerate(names))]:
            if len(rows := (index == i).nonzero().flatten()):
                own = [_take(a, rows, len(index)) for a in args]
                parts.append(call(*own, **{k: _take(v, rows, len(index)) for k, v in kwargs.items()}))
                places.append(rows)
        return _join(parts, torch.cat(places).argsort())


def _take(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_take(v, rows, batch) for v in value)
    return value.index_select(0, rows) if isinstance(value, Tensor) and value.ndim and len(value) == batch else value


def _join(parts: list[Any], order: Tensor) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(_join(list(p), order) for p in zip(*parts, strict=True))
    if isinstance(parts[0], dict):  # transformers' outputs are dictionaries
        joined = copy.copy(parts[0])
        for key in parts[0]:
            joined[key] = _join([p[key] for p in parts], order)
        return joined
    return torch.cat(parts).index_select(0, order) if isinstance(parts[0], Tensor) else parts[0]
