"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li & Liang, ACL 2021. arXiv:2101.00190

    attention(Q, [P_k; K], [P_v; V])          at every attention of every block               (sec. 4.2)
    [P_k, P_v] = W_up tanh(W_down P' + b) + b_up,   P' in R^{p x d}, W_down in R^{m x d}      (sec. 4.3)

Encoder, decoder and cross-attention have a P' and W_down each, every attention its rows of W_up; in the end `flatten`
leaves P_k and P_v alone. Positions of tokens are not shifted, prefix keys are not rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Adapter, Base, DeltatuneError, Intervention, Method, Site, Union
from deltatune.models.prefixing import Positions, geometry, group, prepend, stack, width


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """`length` p; `hidden` m, the width of the network that makes the prefix, None to train P_k and P_v themselves."""

    lr: ClassVar[float] = 5e-3
    length: int = 16
    hidden: int | None = None

    usual = ("attention",)
    at = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [n for n, v in (("length", self.length), ("hidden", self.hidden)) if v is not None and v < 1]:
            raise DeltatuneError(f"PrefixTuning: {wrong[0]} must be at least 1, got {getattr(self, wrong[0])}")

    def parts(self) -> Sequence[Method]:
        return self, Positions()

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        if self.hidden is None:
            return None
        return nn.ModuleDict({g: Trunk(s, self.length, self.hidden) for g, s in {group(s): s for s in sites}.items()})

    def build(self, site: Site, shared: nn.Module | None) -> Prefix:
        heads, dim = geometry(site)
        if isinstance(shared, nn.ModuleDict) and self.hidden is not None:
            return Prefix(Network(shared[group(site)], self.hidden, site, heads, dim))
        return Prefix(Flat(*torch.randn(2, heads, self.length, dim, **site.like)))


class Flat(nn.Module):
    """`k`, `v` (kv heads, p, head_dim)."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(k), nn.Parameter(v)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


class Trunk(nn.Module):
    """`prefix` P' (p, d) and `down`."""

    def __init__(self, site: Site, length: int, hidden: int) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(length, width(site), **site.like))
        self.down = nn.Linear(width(site), hidden, **site.like)

    def forward(self) -> Tensor:
        return torch.tanh(self.down(self.prefix))


class Network(nn.Module):
    """`up`: the rows of W_up that make the keys and values of one attention."""

    def __init__(self, trunk: nn.Module, hidden: int, site: Site, heads: int, dim: int) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads
        self.up = nn.Linear(hidden, 2 * heads * dim, **site.like)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.up(self.trunk()).unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3).unbind()


class Prefix(Intervention):
    """`source()` -> P_k, P_v (kv heads, p, head_dim)."""

    only_prepends = True  # so it runs where attention is computed in the module, too

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = source

    def forward(self, call: Base, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        k, v = self.source()
        return prepend(call, k[None], v[None], None, query, key, value, mask, **kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        return prepend(call, *stack([u.source() for u in units], rows), *args, **kwargs)


@torch.no_grad()
def flatten(adapter: Adapter) -> None:
    """Replace the network by the keys and values that it makes, the same to the bit: they alone are saved then."""
    for _, unit in adapter.units():
        if isinstance(unit, Prefix) and isinstance(unit.source, Network):
            unit.source = Flat(*(t.clone() for t in unit.source()))
    for i in [i for i, m in enumerate(adapter.method.parts()) if isinstance(m, PrefixTuning) and m.hidden is not None]:
        adapter.record.shared.pop(str(i))
    adapter.record.method = _flat(adapter.method)


def _flat(m: Method) -> Method:
    if isinstance(m, Union):
        return replace(m, methods=tuple(map(_flat, m.methods)))
    return replace(m, hidden=None) if isinstance(m, PrefixTuning) else m
