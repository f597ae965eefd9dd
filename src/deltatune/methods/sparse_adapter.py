"""SparseAdapter: An Easy Approach for Improving the Parameter-Efficiency of Adapters. He et al., Findings of EMNLP
2022. arXiv:2210.04284

    W <- M * W    for the down and up projections W of every adapter (of LoRA: A and B), biases as they are

M marks the int(density N) largest scores z of all N weights w. It is chosen once, before the first step:

    random      z uniform in [0, 1)
    magnitude   z = |w|
    snip        z = |g * w|,         g = dL/dw, summed over the batches
    grasp       z = w * H g          H the Hessian of L; H g is a central difference of gradients
    synflow     z = |w * dR/dw|,     R = 1' |W_up| |W_down| 1, of each adapter by itself

The paper's Large-Sparse, a larger adapter of no more weights, is `inner=Houlsby(size=128), density=0.5` for size=64.
While W_up = 0 all scores of snip and synflow are zero, so projections start normal of deviation `std`, as the authors'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from deltatune.callbacks.selection import Selection, Units
from deltatune.callbacks.sparse_adapter import Prune, Score
from deltatune.core import Callback, DeltatuneError, Method, Run, Select, Site
from deltatune.methods.coordinates import check_share
from deltatune.methods.houlsby import Houlsby


@dataclass(frozen=True, kw_only=True)
class SparseAdapter(Method):
    """`inner`: the method that is pruned, which has the targets; `batches`: those that snip and grasp see. `std`: of
    projections that no init of `inner` draws; None: as `inner` draws them."""

    lr: ClassVar[float] = 2e-3
    inner: Method = field(default_factory=Houlsby)
    density: float = 0.5
    score: Score = "snip"
    batches: int = 8
    std: float | None = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density")
        if self.score not in get_args(Score) or self.batches < 1:
            told = f"{self.score!r} is not one of {', '.join(get_args(Score))}, or batches={self.batches} is below 1"
            raise DeltatuneError(f"SparseAdapter: score={told}")
        if self.targets is not None:
            raise DeltatuneError("SparseAdapter: targets are those of the method that is pruned; give them to inner")

    def parts(self) -> Sequence[Method]:
        return [_Part(of=self, dense=part) for part in self.inner.parts()]

    def callbacks(self) -> Iterable[Callback]:
        return [*self.inner.callbacks(), Selection(method=self)]

    def begin(self, run: Run, units: Units) -> Prune:
        return Prune(self, units)


@dataclass(frozen=True, kw_only=True)
class _Part(Method):
    of: SparseAdapter
    dense: Method

    usual, at = property(lambda self: self.dense.usual), property(lambda self: self.dense.at)  # type: ignore[assignment]

    def select(self, model: nn.Module) -> Select:
        return self.dense.select(model)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return self.dense.shared(sites)

    def build(self, site: Site, shared: nn.Module | None) -> Any:
        unit, of = self.dense.build(site, shared), self.of
        found = [(m, names) for m in unit.modules() if (names := _projections(m))]
        if not found and len(of.parts()) == 1 and [*unit.parameters()]:
            raise DeltatuneError(f"SparseAdapter: {type(self.dense).__name__} has no down and up projections to prune")
        for m, names in found:
            if getattr(m, "waits", None) is not None:
                raise DeltatuneError("SparseAdapter: an init from data comes when the projections are pruned; leave it")
            for name, w in ((n, m.get_parameter(n)) for n in names):
                m.register_buffer(f"{name}_mask", torch.ones_like(w, dtype=torch.bool))
                if of.std is not None and getattr(self.dense, "init", None) is None:
                    nn.init.normal_(w, std=of.std)
            m.register_buffer("chosen", torch.tensor(False, device=site.device))
            m.method, m.__class__ = of, _masked(type(m), names)  # type: ignore[assignment, arg-type]
        return unit


def _projections(module: nn.Module) -> tuple[str, ...]:
    """The names of the down and the up projection, in this order."""
    roles = {role: name for name, role in getattr(module, "roles", {}).items() if name in module._parameters}
    return (roles["down"], roles["up"]) if {"down", "up"} <= roles.keys() else ()


class Masked:
    """Before a unit's own class: `names`, its projections, are seen through their masks."""

    plain: ClassVar[type[nn.Module]]
    names: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.plain, self.names), self.__dict__.copy()


@cache
def _masked(cls: Any, names: tuple[str, ...]) -> Any:
    see = {n: property(lambda self, n=n: self._parameters[n] * self._buffers[f"{n}_mask"]) for n in names}  # type: ignore[misc]
    return type(f"Sparse{cls.__name__}", (Masked, cls), {"plain": cls, "names": names, **see})


def _revive(cls: Any, names: tuple[str, ...]) -> Any:
    return object.__new__(_masked(cls, names))
