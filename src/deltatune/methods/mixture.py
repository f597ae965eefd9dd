"""A mixture of adapters at each site: MoLORA (Zadouri et al., ICLR 2024, arXiv:2309.05444) with `top_k=n, balance=0`;
MixLoRA and MoLA route to the top 2.

    y = sum_i g_i(x) f_i(x),   g = softmax over the top k of W_g x,   f_i = the base under expert i

Any method of one part can be the expert. The gates sum to one, so for low-rank experts, f_i(x) = W x + s_i B_i A_i x,

    y = W x + [s_1 B_1 ... s_n B_n] (g * [A_1; ...; A_n] x)

costs one base product and one low-rank one of rank n r, without gathering tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Callback, DeltatuneError, Intervention, Method, Site
from deltatune.methods.lora import LoRA, LowRank
from deltatune.routers.top_k import Balance, TopK


@dataclass(frozen=True, kw_only=True)
class Mixture(Method):
    """`n` experts, of which each token takes `top_k`; `balance` and `z` weigh the losses of `routers.top_k`."""

    expert: Method = field(default_factory=LoRA)
    n: int = 4
    top_k: int = 2
    balance: float = 0.01
    z: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.n:
            raise DeltatuneError(f"Mixture: top_k must lie between 1 and n={self.n}, got {self.top_k}")
        kind = type(self.expert)
        apart = kind.select is not Method.select and kind.shared is not Method.shared  # one unit needs another
        if apart or tuple(self.expert.parts()) != (self.expert,) or "attention" in self.expert.at:
            raise DeltatuneError(
                f"Mixture: {kind.__name__} cannot be an expert; one acts at each module by itself, as LoRA"
            )

    @property
    def usual(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.expert.usual

    @property
    def at(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.expert.at

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return self.expert.shared(sites)

    def build(self, site: Site, shared: nn.Module | None) -> Experts:
        if isinstance(site.module, nn.Embedding):
            raise DeltatuneError(f"Mixture: {site.path!r} is an embedding, whose input is ids; a router needs vectors")
        experts = [self.expert.build(site, shared) for _ in range(self.n)]
        return Experts(experts, TopK(site.shape.in_, self.n, self.top_k, **site.like))

    def callbacks(self) -> Iterable[Callback]:
        balance = [Balance(balance=self.balance, z=self.z)] if self.balance or self.z else []
        return [*self.expert.callbacks(), *balance]


class Experts(Intervention):
    def __init__(self, experts: Sequence[Intervention], router: TopK) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, call: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (call.is_linear and all(_is_product(e) for e in self.experts)):
            return self.router(x, [partial(e, call, x, *args, **kwargs) for e in self.experts])
        pairs = [e.factors() for e in self.experts]  # type: ignore[operator]
        up, down = torch.cat([u for u, _ in pairs], 1), torch.cat([d for _, d in pairs])
        h = F.linear(x.to(down.dtype), down).unflatten(-1, (len(pairs), -1))  # (..., n, r)
        h = (self.router.gates(x)[..., None].to(h.dtype) * h).flatten(-2)
        y = call(x)
        return y + F.linear(h, up).to(y.dtype)


def _is_product(expert: nn.Module) -> bool:
    """Whether what the expert adds is its factors' product and nothing else, such as dropout."""
    return type(expert) is LowRank and not (expert.training and expert.dropout.p)
