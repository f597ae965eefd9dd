"""Rows of one batch with adapters of their own: what a server of many adapters runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from deltatune.core import Base, DeltatuneError, Intervention, Router, nearest, plain_class, within
from deltatune.core.units import CALL


class _Apart(Exception):
    """A unit leaves rows of its own to be run apart."""


@dataclass(frozen=True)
class _Among:
    """Units of one kind, each around its `rows`, those that are -1 being others'."""

    kind: Any
    units: Sequence[Any]
    rows: Tensor

    def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        done = self.kind.batched(self.units, self.rows, call, *args, **kwargs)
        if done is NotImplemented:
            raise _Apart
        return done


class PerRow(Router):
    """Each row of the batch names its adapter: `PerRow(["law", "style", None])`; None is the base alone.

    A task of an adapter that has several is named after it, `"sources.squad"`. A batch may also hold a multiple of the
    rows, as beam search and flattened tokens do; it is split evenly.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        super().__init__()
        self.told = tuple(names)
        self.rows = tuple(None if n is None else n.partition(".")[::2] for n in names)
        self.names = tuple(None if row is None else row[0] for row in self.rows)
        self.made: dict[Any, Tensor] = {}  # so that a device is asked once a batch, not at every site

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
        key = tuple(adapters), times, x.device
        if torch.compiler.is_compiling() or key not in self.made:
            at = [adapters.index(row) if row in adapters else -1 for row in self.rows]
            made = torch.tensor(at, device=x.device).repeat_interleave(times)
            if torch.compiler.is_compiling():
                return made
            self.made[key] = made
        return self.made[key]

    def route(self, names: Sequence[str], units: Mapping[str, Sequence[Intervention]], bind: Callable[..., Base],
              args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # fmt: skip
        here, base = list(dict.fromkeys(row for row in self.rows if row is not None and row[0] in units)), bind()
        kinds = {type(u).batched.__func__: type(u) for n in units for u in units[n]}  # type: ignore[attr-defined]
        values = (*args, *kwargs.values())
        index = self.index(here, next(t for t in values if isinstance(t, Tensor) and t.ndim))
        own = [[u.of(task) for u in units[n]] for n, task in here]
        if len(kinds) == 1 and all(len(mine) == 1 for mine in own):
            done = next(iter(kinds.values())).batched([u for (u,) in own], index, base, *args, **kwargs)
            if done is not NotImplemented:
                return done
        if (len(args) != 1 or kwargs) and Intervention.batched.__func__ not in kinds:  # type: ignore[attr-defined]
            with suppress(_Apart):
                kept = [[(type(a), b) for a, b in zip(units[n], mine, strict=True)]
                        for (n, _), mine in zip(here, own, strict=True)]  # fmt: skip
                return _at_once(base, kept, index)(*args, **kwargs)
        calls = [bind(n) if list(units[n]) == mine else reduce(lambda b, u: b.then(u, CALL), mine, base)
                 for (n, _), mine in zip(here, own, strict=True)]  # fmt: skip
        groups = [(call, rows) for i, call in enumerate([base, *calls], -1)
                  if len(rows := (index == i).nonzero().flatten())]  # fmt: skip
        if len(groups) == 1:
            return groups[0][0](*args, **kwargs)
        if any(hasattr(v, "get_seq_length") for v in values):
            told, at = ", ".join(sorted({type(u).__name__ for n in units for u in units[n]})), type(base.module)
            raise DeltatuneError(
                f"PerRow: rows under {told} at a {plain_class(at).__name__} are run apart, and cannot share the cache "
                "of one batch's keys and values; run these rows in other batches, or with use_cache=False"
            )
        n, parts = len(index), []
        for call, rows in groups:
            some = {k: _take(v, rows, n) for k, v in kwargs.items()}
            with self._inside(base.module, rows, n):
                parts.append(call(*(_take(a, rows, n) for a in args), **some))
        return _join(parts, torch.cat([rows for _, rows in groups]).argsort())

    def _inside(self, module: Any, rows: Tensor, batch: int) -> AbstractContextManager[None]:
        """Within, the modules that this one holds are called with these rows of the batch alone."""
        if len(module._modules) == 1:  # only its slot
            return nullcontext()
        names = [self.told[i * len(self.told) // batch] for i in rows.tolist()]
        router = PerRow(names)
        here = tuple(n for n in dict.fromkeys(router.names) if n is not None)
        return within(module, here, router)


def _at_once(base: Base, own: Sequence[Sequence[tuple[Any, Any]]], index: Tensor) -> Base:
    """`base` inside all units (kind, unit), each for its own rows: one call, which writes once what rows share.

    Adapters of the same kinds are side by side: each of two side networks has the base inside, not the other."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i in sorted(range(len(own)), key=lambda i: any(kind.lengthens for kind, _ in own[i])):
        alike.setdefault(tuple(kind for kind, _ in own[i]), []).append(i)
    for kinds, mine in alike.items():
        rows = torch.full_like(index, -1)
        for j, i in enumerate(mine):
            rows = torch.where(index == i, j, rows)
        for depth, kind in enumerate(kinds):
            base = base.then(_Among(kind, [own[i][depth][1] for i in mine], rows), CALL)  # type: ignore[arg-type]
    return base


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
    if isinstance(parts[0], Tensor):
        return torch.cat(parts).index_select(0, order)
    return parts[0] if all(p is parts[0] or p == parts[0] for p in parts) else None  # such as a cache of some rows
