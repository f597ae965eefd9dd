"""Rows of one batch with adapters of their own: what a server of many adapters runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from deltatune.core import Base, DeltatuneError, Intervention, Router, nearest
from deltatune.core.units import CALL


class PerRow(Router):
    """Each row of the batch names its adapter: `PerRow(["law", "style", None])`; None is the base alone.

    A task of an adapter that has several is named after it, `"sources.squad"`. A batch may also hold a multiple of the
    rows, as beam search and flattened tokens do; it is split evenly.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        super().__init__()
        self.rows = tuple(None if n is None else n.partition(".")[::2] for n in names)
        self.names = tuple(None if row is None else row[0] for row in self.rows)

    def check(self, methods: Mapping[str, Any]) -> None:
        for name, task in dict.fromkeys(row for row in self.rows if row is not None):
            tasks = tuple(t for part in methods[name].parts() for t in getattr(part, "tasks", ()))
            if task and task not in tasks:
                raise DeltatuneError(f"adapter {name!r} has no task {task!r}{nearest(task, tasks)}")
            if not task and len(tasks) > 1:
                raise DeltatuneError(f"adapter {name!r} has several tasks; name one, as '{name}.{tasks[0]}'")

    def index(self, adapters: Sequence[Any], x: Tensor) -> Tensor:
        """(batch,): the position in `adapters`, names and tasks, of each row's, -1 for what is not there."""
        times, rest = divmod(x.shape[0], len(self.rows))
        if rest or not times:
            raise DeltatuneError(f"PerRow names {len(self.rows)} rows; this call's batch has {x.shape[0]}")
        at = [adapters.index(row) if row in adapters else -1 for row in self.rows]
        return torch.tensor(at, device=x.device).repeat_interleave(times)

    def route(self, names: Sequence[str], units: Mapping[str, Sequence[Intervention]], bind: Callable[..., Base],
              args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # fmt: skip
        here, base = list(dict.fromkeys(row for row in self.rows if row is not None and row[0] in units)), bind()
        kinds = {type(u).batched.__func__: type(u) for n in units for u in units[n]}  # type: ignore[attr-defined]
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim]
        index = self.index(here, tensors[0])
        own = [[u.of(task) for u in units[n]] for n, task in here]
        if len(kinds) == 1 and all(len(mine) == 1 for mine in own):
            done = next(iter(kinds.values())).batched([u for (u,) in own], index, base, *args, **kwargs)
            if done is not NotImplemented:
                return done
        calls = [bind(n) if list(units[n]) == mine else reduce(lambda b, u: b.then(u, CALL), mine, base)
                 for (n, _), mine in zip(here, own, strict=True)]  # fmt: skip
        places, parts = [], []
        for i, call in enumerate([base, *calls], -1):
            if len(rows := (index == i).nonzero().flatten()):
                cut = [_take(a, rows, len(index)) for a in args]
                parts.append(call(*cut, **{k: _take(v, rows, len(index)) for k, v in kwargs.items()}))
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
