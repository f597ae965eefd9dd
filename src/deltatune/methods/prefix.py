"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li & Liang, ACL 2021. arXiv:2101.00190

    attention(Q, [P_k; K], [P_v; V])          at every attention of every block               (sec. 4.2)
    [P_k, P_v] = W_up tanh(W_down P' + b) + b_up,   P' in R^{p x d}, W_down in R^{m x d}      (sec. 4.3)

Encoder, decoder and cross-attention have a P' and W_down each, every attention its rows of W_up; in the end `flatten`
leaves P_k and P_v alone. Positions of tokens are not shifted, prefix keys are not rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Method, Site
from deltatune.models.prefixing import Flat, Positions, Prefix, geometry, group, heard, width
from deltatune.models.prompting import Positioned


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Positioned):
    """`length` p; `hidden` m, the width of the network that makes the prefix, None to train P_k and P_v themselves.

    init: "normal", N(0, 1) for P_k and P_v or for P'; or the token ids of a text, repeated or cut to p, whose keys and
        values in the base are where it starts (the paper's low-data setting); with a network exactly if m >= p.
    dropout: of P_k and P_v in training.
    """

    lr: ClassVar[float] = 2e-2
    length: int = 16
    hidden: int | None = None
    init: Literal["normal"] | tuple[int, ...] = "normal"
    dropout: float = 0.0
    positions: str = "kept"

    usual = ("attention",)
    at: ClassVar[tuple[str, ...]] = ("attention",)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if wrong := [n for n, v in (("length", self.length), ("hidden", self.hidden)) if v is not None and v < 1]:
            raise DeltatuneError(f"{name}: {wrong[0]} must be at least 1, got {getattr(self, wrong[0])}")
        if self.init != "normal" and (isinstance(self.init, str) or not self.init):
            raise DeltatuneError(f"{name}: init is 'normal' or token ids, got {self.init!r}; tokenise a text first")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"{name}: dropout must be at least 0 and below 1, got {self.dropout}")

    def parts(self) -> Sequence[Method]:
        return self, Positions()

    def flat(self) -> PrefixTuning:
        return replace(self, hidden=None)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        trunks, text = Trunks(), isinstance(self.init, tuple) and sites[0].device.type != "meta"
        if self.hidden is not None:
            trunks.update({g: Trunk(s, self.length, self.hidden) for g, s in {group(s): s for s in sites}.items()})
        trunks.text = heard(sites, (self.init * self.length)[: self.length]) if text else {}  # type: ignore[arg-type]
        return trunks if trunks or text else None

    def build(self, site: Site, shared: nn.Module | None) -> Prefix:
        heads, dim = geometry(site)
        text = shared.text.pop(site.path, None) if isinstance(shared, Trunks) else None
        if not isinstance(shared, Trunks) or self.hidden is None:
            start = torch.randn(2, heads, self.length, dim, **site.like) if text is None else text
            return Prefix(Flat(*start), self.dropout)
        network = Network(shared[group(site)], self.hidden, site, heads, dim)
        if text is not None:
            network.fit(*text)
        return Prefix(network, self.dropout)


class Trunks(nn.ModuleDict):
    """By group; `text`: what prefixes still to be built start from, by path."""

    text: dict[str, tuple[Tensor, Tensor]]


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

    @torch.no_grad()
    def fit(self, k: Tensor, v: Tensor) -> None:
        """The nearest W_up at which the mean squared error to k and v is least: the paper takes Adam's steps to it."""
        x, y = self.trunk(), torch.stack([k, v]).permute(2, 0, 1, 3).flatten(1)
        change = torch.linalg.pinv(x.double()) @ (y - self.up(x)).double()
        self.up.weight += change.T.to(self.up.weight.dtype)
