"""AdapterDrop: On the Efficiency of Adapters in Transformers. Rueckle et al., EMNLP 2021. arXiv:2010.11918

The adapters of the lowest n blocks are left out, whatever method they are of: what enters block n is the base's, which
several adapters can share, and no gradient is computed below it.

    specialised   n is fixed: blocks 0 ... n - 1 have none
    robust        n ~ uniform {0, ..., L - 1}, drawn anew each step: one adapter for every n, see `AdapterDrop.drop`

Encoder and decoder count their blocks apart. Embeddings and their norms count as of block 0; what else is in no block,
a head or the last norm, stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import nn

from deltatune.callbacks.adapter_drop import DepthDraw, Dropping, DroppingDelta
from deltatune.core import Adapter, Callback, Delta, DeltatuneError, Intervention, Layers, Method, Select, Site, attach
from deltatune.core.select import resolve, walk
from deltatune.methods.pfeiffer import Pfeiffer


@dataclass(frozen=True, kw_only=True)
class AdapterDrop(Method):
    """`inner`: the method, which has the targets; `n`: of a specialised adapter, None for a robust one, whose draws
    depend on `seed` and the step alone."""

    lr: ClassVar[float] = 2e-3
    inner: Method = field(default_factory=Pfeiffer)
    n: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n is not None and self.n < 0:
            raise DeltatuneError(f"AdapterDrop: n must be at least 0, got {self.n}; None draws it")
        if self.targets is not None:
            raise DeltatuneError("AdapterDrop: targets are those of the method whose adapters drop; give them to inner")

    def parts(self) -> Sequence[_Part]:
        return [_Part(of=self, inner=part) for part in self.inner.parts()]

    def callbacks(self) -> Iterable[Callback]:
        return [*self.inner.callbacks(), *([DepthDraw(seed=self.seed)] if self.n is None else [])]

    def portable(self, units: Sequence[Intervention]) -> AdapterDrop:
        return replace(self, inner=self.inner.portable([u.inner if isinstance(u, Dropping) else u for u in units]))

    @staticmethod
    def drop(adapter: Adapter, n: int, name: str) -> Adapter:
        """Attach what a trained adapter has in blocks n and above as one of its own called `name`, and activate it."""
        method = adapter.method
        if not isinstance(method, AdapterDrop) or n < (method.n or 0):
            raise DeltatuneError(
                f"AdapterDrop: adapter {adapter.name!r} is {method}; blocks below {n} cannot be dropped"
            )
        whole = adapter.state_dict()
        for path, unit in adapter.units():
            at = next((f"{n}.".lstrip(".") for n, m in unit.named_modules() if isinstance(m, Dropping)), "")
            whole |= {f"{path}.{k.replace(f'{at}inner.', at, 1)}": t for k, t in unit.state_dict().items()}
        alone = method.portable([unit for _, unit in adapter.units()])
        cut = attach(adapter.model, replace(alone, n=n), name, dtype=adapter.dtype)
        cut.load_state_dict({k: whole[k] for k in cut.state_dict()})
        return cut


def block_of(path: str, module: nn.Module) -> int | None:
    """The block that a module counts as of; None for what lies above all."""
    if (number := _number(path)) is not None:
        return number
    if any(isinstance(m, nn.ModuleList) for _, m in walk(module)):
        raise DeltatuneError(f"AdapterDrop: {path or 'the model'!r} holds blocks; inner must act inside of them")
    return 0 if re.search(r"embed|(^|\.)w[tp]e$", path) else None


def _number(path: str) -> int | None:
    return next((int(p) for p in path.split(".") if p.isdigit()), None)


@dataclass(frozen=True, kw_only=True)
class _Part(Method):
    of: AdapterDrop
    inner: Method

    usual = property(lambda self: self.inner.usual)  # type: ignore[assignment]
    at = property(lambda self: self.inner.at)  # type: ignore[assignment]

    def select(self, model: nn.Module) -> Select:
        if (kept := self.kept(model)) != () or any(part.kept(model) != () for part in self.of.parts()):
            return kept
        raise DeltatuneError(f"AdapterDrop: n={self.of.n} drops every adapter of this model; give less")

    def kept(self, model: nn.Module) -> Select:
        select, n = self.inner.select(model), self.of.n
        if select == () or not n:
            return select
        matches = [(m.path, block_of(m.path, m.module)) for m in resolve(model, select, self.usual)]
        last = max((b for path, b in matches if b is not None and _number(path) is not None), default=-1)
        above = tuple(re.escape(path) for path, b in matches if b is None)
        return (*([Layers(targets=select, start=n)] if n <= last else []), *above)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return self.inner.shared(sites) if sites else None

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        unit, block = self.inner.build(site, shared), block_of(site.path, site.module)
        if self.of.n is not None or block is None:
            return unit
        return (DroppingDelta if isinstance(unit, Delta) else Dropping)(unit, block)
