"""Adapters that were trained before, for an `AdapterFusion`: from the model, from folders, or from their methods alone,
the tensors to follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltatune.core import (
    DeltatuneError,
    Intervention,
    Method,
    Part,
    Site,
    Union,
    adapters,
    nearest,
    read_adapter,
    resolve,
)  # fmt: skip
from deltatune.methods.tune import Tune


@dataclass(frozen=True)
class Trained:
    """An adapter with one bottleneck at each of its sites. `state`: its tensors, None for untrained."""

    name: str
    method: Method
    state: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        parts = self.method.parts()
        if len(parts) != 1 or parts[0].at != ("call",):
            kinds = " and ".join(type(p).__name__ for p in parts) or "only a head"
            raise DeltatuneError(f"AdapterFusion: adapter {self.name!r} is {kinds}, not one bottleneck at each of its "
                                 "modules; train it as Houlsby(norms=None), say")  # fmt: skip

    @classmethod
    def find(cls, model: nn.Module, name: str) -> Trained:
        """The adapter on the model that is called so, else the one in the folder; without the head of its task."""
        attached = adapters(model)
        state: Mapping[str, Tensor]
        if name in attached:
            method, state = attached[name].method, attached[name].state_dict()
        elif Path(name).is_dir():
            method, state = read_adapter(model, name)
        else:
            raise DeltatuneError(f"AdapterFusion: {name!r} is neither an adapter on the model{nearest(name, attached)} "
                                 "nor the folder of a saved one")  # fmt: skip
        rest = tuple(m for m in _members(method) if not (isinstance(m, Tune) and _is_head(model, m)))
        return cls(name, rest[0] if len(rest) == 1 else Union(methods=rest), state)

    @property
    def part(self) -> Method:
        (part,) = self.method.parts()
        return part

    def paths(self, model: nn.Module) -> list[str]:
        return [m.path for m in resolve(model, self.part.select(model), self.part.usual)]

    def written(self, paths: Sequence[str]) -> Method:
        """The method, with targets that can be written down."""
        try:
            self.method.to_dict()
        except DeltatuneError:
            return replace(self.method, targets=tuple(paths))
        return self.method

    def units(self, sites: Sequence[Site]) -> list[Intervention]:
        """One for each site, with its tensors."""
        part = self.part
        common = part.shared(sites)
        made = [part.build(site, common) for site in sites]
        for site, unit in zip(sites, made, strict=True):
            if not {"down", "up"} <= set(unit.roles.values()):
                kind = type(self.method).__name__
                raise DeltatuneError(f"AdapterFusion: adapter {self.name!r}: {kind} has no bottleneck at {site.path!r}")
            if self.state is not None:
                self._fill(unit, site.path)
        return made

    @torch.no_grad()
    def _fill(self, unit: Intervention, path: str) -> None:
        prefix, own = f"{path}.0.".lstrip("."), unit.state_dict(keep_vars=True)
        given = {k.removeprefix(prefix): t for k, t in (self.state or {}).items() if k.startswith(prefix)}
        if {k: t.shape for k, t in given.items()} != {k: t.shape for k, t in own.items()}:
            raise DeltatuneError(f"AdapterFusion: adapter {self.name!r} does not fit {path!r}: of another base?")
        for k, t in given.items():
            own[k].copy_(t)


def _members(method: Method) -> list[Method]:
    return [m for one in method.methods for m in _members(one)] if isinstance(method, Union) else [method]


def _is_head(model: nn.Module, tune: Tune) -> bool:
    """Whether it is the head, or what else was drawn beside it: matrices outside the blocks, such as a pooler's."""
    if tune.targets in (None, Part("head")):
        return True
    found = resolve(model, tune.targets)
    return all(
        isinstance(w := getattr(m.module, "weight", None), Tensor)
        and w.ndim == 2
        and not isinstance(m.module, nn.Embedding)
        and not any(step.isdigit() for step in m.path.split("."))
        for m in found
    )
