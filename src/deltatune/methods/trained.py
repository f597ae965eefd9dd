"""Bottleneck adapters that were trained before, frozen, side by side at each site of an `AdapterFusion`.

They come from the model, from folders, or from their methods, the tensors to follow. A bottleneck says what it adds by
`core(x)`, and where by `around(core, call, ...)`, as Pfeiffer's; one without these adds A(u) - u to u, the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import (
    Base,
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
from deltatune.routers.adapter_fusion import FusionAttention

Core = Callable[[Tensor], Tensor]


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


class Units(nn.Module):
    """The units of all adapters, until the sites have taken theirs."""

    def __init__(self, found: Sequence[Trained], sites: Sequence[Site]) -> None:
        super().__init__()
        paths = [site.path for site in sites]
        self.methods = tuple(t.written(paths) for t in found)
        self.left = dict(zip(paths, zip(*(t.units(sites) for t in found), strict=True), strict=True))


class Fusion(Intervention):
    """`adapters`, whose tensors are buffers, saved or not; `attention` over them. `methods`: those of the adapters."""

    def __init__(self, site: Site, units: Units, fusion: Method, dropout: float, saved: bool) -> None:
        super().__init__()
        mine, self.fusion, self.methods = units.left.pop(site.path), fusion, units.methods
        if len({type(unit) for unit in mine}) > 1:
            kinds = " and ".join(dict.fromkeys(type(m).__name__ for m in self.methods))
            raise DeltatuneError(f"AdapterFusion: {kinds} add at different places; fuse adapters of one kind")
        self.adapters = nn.ModuleList(_frozen(unit, saved) for unit in mine)
        self.attention = FusionAttention(len(mine[0].up), dropout, **site.like)  # type: ignore[arg-type]

    def core(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.attention(wide, [partial(_core, adapter, wide) for adapter in self.adapters]).to(x.dtype)

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.adapters[0], "around", _after)(self.core, call, *args, **kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        places = {getattr(unit.adapters[0], "around", None) for unit in units}
        if len(places) > 1 or (around := places.pop()) is None:
            return NotImplemented

        def core(x: Tensor) -> Tensor:  # a block may write to a cache that all rows share
            y = torch.zeros_like(x)
            for i, unit in enumerate(units):
                mine = (rows == i).nonzero().flatten()
                y = y.index_copy(0, mine, unit.core(x.index_select(0, mine)))
            return y

        return around(core, call, *args, **kwargs)


def _after(core: Core, call: Base, *args: Any, **kwargs: Any) -> Tensor:
    u = call(*args, **kwargs)
    return u + core(u)


def _core(adapter: Any, x: Tensor) -> Tensor:
    return adapter.core(x) if hasattr(adapter, "core") else adapter(lambda *args, **kwargs: x) - x


def _frozen(unit: Intervention, saved: bool) -> Intervention:
    for module in unit.modules():
        held = {**module._parameters, **module._buffers}
        module._parameters.clear()
        for name, t in held.items():
            module.register_buffer(name, None if t is None else t.detach(), persistent=saved)
    return unit
