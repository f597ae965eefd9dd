"""Class grafting: a module is given a subclass of its own class plus one child, `adapters`, the slot.

So `isinstance` still holds, its path is unchanged, and base checkpoints load as if no adapter were there; as
`torch.nn.utils.parametrize` and FSDP2 do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import nn

from deltatune.core.method import Method
from deltatune.core.select import SLOT, walk
from deltatune.core.units import ATTENTION, CALL, Base, Intervention, Router

_MARK = "_deltatune_switch"


@dataclass(frozen=True)
class Active:
    """Which adapters are in effect: stacked in order, or combined by `router`."""

    names: tuple[str, ...] = ()
    router: Router | None = None


@dataclass
class Record:
    """What a model remembers of an attached adapter."""

    method: Method
    shared: nn.ModuleDict
    dtype: torch.dtype


@dataclass
class Switch:
    """The one object that all slots of a model share, so that activation costs the same at any size."""

    current: Active = field(default_factory=Active)
    records: dict[str, Record] = field(default_factory=dict)
    thawed: tuple[str, ...] = ()  # base parameters that required gradients before
    points: tuple[str, ...] = ()  # installed places, see `register_point`
    merged: list[str] = field(default_factory=list)  # in the order of merging
    named: tuple[Any, Any] | None = None  # the base's own names of its classes, while an adapter's are told
    threads: dict[int, Active] = field(default_factory=dict)

    def active(self) -> Active:
        return self.threads.get(get_ident(), self.current) if self.threads else self.current

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"threads": {}}

    @contextmanager
    def using(self, active: Active) -> Iterator[None]:
        """`active` for the calls of this thread alone."""
        me = get_ident()
        before = self.threads.get(me)
        self.threads[me] = active
        try:
            yield
        finally:
            if before is None:
                del self.threads[me]
            else:
                self.threads[me] = before


def within(module: nn.Module, names: tuple[str, ...], router: Router) -> AbstractContextManager[None]:
    """For what a grafted `module` calls in this thread: `names` combined by `router` are in effect."""
    return module._modules[SLOT].switch.using(Active(names, router))  # type: ignore[no-any-return, union-attr, operator]


class Slot(nn.Module):
    """What a grafted module carries: its units by adapter name, where each acts, and what merging replaced."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.switch = switch
        self.units = nn.ModuleDict()
        self.places: dict[str, list[str]] = {}
        self.merged: dict[str, list[Any]] = {}
        self.rewritten: dict[str, list[Any]] = {}  # quantised weights that an adapter's init replaced

    def at(self, name: str, attention: bool = False) -> list[tuple[Intervention, str]]:
        """The units of `name` around the call, or around the attention function; merged ones are in the base."""
        return [] if name in self.merged else [(u, p) for u, p in self.pairs(name) if (p == ATTENTION) == attention]

    def pairs(self, name: str) -> list[tuple[Any, str]]:
        """(unit, place) of adapter `name` here."""
        units = self.units[name] if name in self.places else ()
        return list(zip(units, self.places.get(name, ()), strict=True))  # type: ignore[arg-type]

    def _only(self, name: str, attention: bool) -> tuple[Any, str] | None:
        """The unit of `name` here and the parameter it is about, if it has just one: the path of nearly every call."""
        places = self.places.get(name, ())
        if attention or len(places) != 1 or places[0] == ATTENTION or name in self.merged:
            return None
        units: Any = self.units._modules[name]
        return units._modules["0"], places[0] if places[0] != CALL else "weight"

    def bind(self, base: Base, *names: str, attention: bool = False) -> Base:
        """`base` under adapters, the first innermost; deltas act on the weight, so they are inside interventions."""
        units = [pair for name in names for pair in self.at(name, attention)]
        for unit, place in sorted(units, key=lambda pair: pair[1] in (CALL, ATTENTION)):
            base = base.then(unit, place)
        return base

    def run(self, module: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
            attention: bool = False) -> Any:  # fmt: skip
        active = self.switch.active()
        if active.router is None and len(active.names) == 1 and (unit := self._only(active.names[0], attention)):
            return unit[0](Base(module, call, unit[1]), *args, **kwargs)
        bind = partial(self.bind, Base(module, call), attention=attention)
        if active.router is None:
            return bind(*active.names)(*args, **kwargs)
        units = {n: [u for u, _ in here] for n in active.names if (here := self.at(n, attention))}
        return active.router.route(active.names, units, bind, args, kwargs) if units else call(*args, **kwargs)


class Grafted:
    """Mixin placed before a module's own class, `plain_class`."""

    plain_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._modules.get(SLOT)  # type: ignore[attr-defined]
        if slot is None:  # detached after FSDP2 had put its own class over ours
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return slot.run(self, super().forward, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.plain_class,), self.__dict__.copy()


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _grafted_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _CLASSES:
        body = {"plain_class": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _CLASSES[cls] = type(f"Adapted{cls.__name__}", (Grafted, cls), body)
    return _CLASSES[cls]


def _revive(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(_grafted_class(cls))


def graft(module: nn.Module, switch: Switch) -> Slot:
    """The module's slot, made if it has none."""
    if not isinstance(module, Grafted):
        module.__class__ = _grafted_class(type(module))
        module.add_module(SLOT, Slot(switch))
    return module._modules[SLOT]  # type: ignore[return-value]


def ungraft(module: nn.Module) -> None:
    del module._modules[SLOT]
    cls = type(module)
    if cls in _CLASSES.values():
        module.__class__ = cls.plain_class  # type: ignore[attr-defined]


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    for path, module in walk(model):
        if SLOT in module._modules and isinstance(slot := module._modules[SLOT], Slot):
            yield path, module, slot


def switch_of(model: nn.Module) -> Switch | None:
    """The model's switch, or that of the adapters found inside it; None when there are none."""
    if (switch := model.__dict__.get(_MARK)) is None:
        switch = next((slot.switch for _, _, slot in slots(model)), None)
    return switch


def set_switch(model: nn.Module, switch: Switch | None) -> None:
    if switch is None:
        model.__dict__.pop(_MARK, None)
    else:
        model.__dict__[_MARK] = switch
