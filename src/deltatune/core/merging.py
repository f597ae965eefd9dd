"""What merging writes into a base's modules, and how it is put back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from deltatune.core.errors import DeltatuneError
from deltatune.core.method import rewrite
from deltatune.core.select import walk
from deltatune.core.units import Delta, Intervention
from deltatune.storage import layers

Change = Callable[[torch.Tensor], torch.Tensor]
Replaced = tuple[str, Any]  # a name in a module, and what `put_back` restores there


@dataclass(frozen=True)
class Attribute:
    """What an attribute of a module was that is no parameter."""

    value: Any


@dataclass
class Lost:
    """How far quantised weights, read back, are from what was written: the sums of squares behind the share."""

    sites: int = 0
    gap: float = 0.0
    change: float = 0.0

    @property
    def share(self) -> float:
        return math.sqrt(self.gap / self.change) if self.change else 0.0

    def add(self, old: torch.Tensor, new: torch.Tensor, stored: torch.Tensor) -> None:
        self.sites += 1
        self.gap += float((stored.to(new.dtype) - new).square().sum())
        self.change += float((new - old.to(new.dtype)).square().sum())


def tied(model: nn.Module) -> set[int]:
    """Identities of the parameters that more than one module holds."""
    held = [id(p) for _, m in walk(model) for p in m._parameters.values() if p is not None]
    return {i for i, n in Counter(held).items() if n > 1}


def write(path: str, module: nn.Module, unit: Intervention, at: str, shared: set[int], lost: Lost
          ) -> Iterator[Replaced]:  # fmt: skip
    """Make the base do by itself what `unit` does in inference, step by step, giving what each step replaced.

    shared: parameters that other modules hold too, see `tied`."""
    if isinstance(unit, Delta):
        yield _parameter(path, module, at, unit.weight, shared, lost)
        if unit.moves_bias and at == "weight" and getattr(module, "bias", None) is not None:
            yield _parameter(path, module, "bias", unit.bias, shared, lost)
    for name, value in attributes(path, module, unit).items():
        owner, last = _owner(module, name)
        yield name, Attribute(getattr(owner, last))
        setattr(owner, last, value)


def attributes(path: str, module: nn.Module, unit: Intervention) -> Mapping[str, Any]:
    """`unit.merged(module)`; what it raises names `path`."""
    try:
        return unit.merged(module)
    except DeltatuneError as error:
        raise DeltatuneError(f"{path or 'the model'}: {error}") from None


def _parameter(path: str, module: nn.Module, at: str, change: Change, shared: set[int], lost: Lost) -> Replaced:
    """Merge one change of a parameter. Returns what must come back: the old parameter itself if others share it, or if
    it is quantised, else a copy of its values."""
    w = layers.read(module, at)
    new = change(w.to(torch.promote_types(w.dtype, torch.float32)))
    if not bool(torch.isfinite(new).all()):
        raise DeltatuneError(f"{path}.{at}: merging would write non-finite weights; the base is unchanged")
    own = module._parameters.get(at)
    if layers.is_quantised(module) and at == "weight":
        old = rewrite(path, module, new)
        lost.add(w, new, layers.read(module, at))
        return at, old
    kept = w.detach().clone()
    if own is not None and (id(own) in shared or new.shape != w.shape):  # a head of other classes has other rows
        fresh = own.detach().clone() if new.shape == w.shape else own.new_empty(new.shape)
        module._parameters[at] = nn.Parameter(fresh, requires_grad=own.requires_grad)
        kept = own
    layers.write(module, at, new)
    return at, kept


def put_back(module: nn.Module, replaced: Sequence[Replaced]) -> None:
    for name, kept in reversed(replaced):
        if isinstance(kept, Attribute):
            owner, last = _owner(module, name)
            setattr(owner, last, kept.value)
        elif isinstance(kept, nn.Parameter):
            module._parameters[name] = kept
        else:
            layers.write(module, name, kept)


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    """Whose attribute `name`, dotted, is, and what it is called there."""
    path, _, last = name.rpartition(".")
    return (attrgetter(path)(module) if path else module), last
