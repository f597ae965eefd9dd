"""Trained bottleneck adapters, frozen, side by side at each site of an `AdapterFusion`.

A bottleneck says what it adds by `core(x)`, and where by `around(core, call, ...)`, as Pfeiffer's; one without these
adds A(u) - u to u, the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention, Method, Site
from deltatune.methods.trained import Trained
from deltatune.routers.adapter_fusion import FusionAttention

Core = Callable[[Tensor], Tensor]


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
