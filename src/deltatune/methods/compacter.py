"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers. Mahabadi et al., NeurIPS 2021. arXiv:2106.04647

    u' = u + up(gelu(down(u))),     each of down, up:  x -> x H + b
    H = sum_{i=1..n} A_i (x) B_i,   A_i in R^{n x n},  B_i in R^{in/n x out/n}     PHM; (x) is the Kronecker product
    B_i = S_i T_i,                  S_i in R^{in/n x k},  T_i in R^{k x out/n}     low-rank PHM

Compacter's B_i are of rank k, and its A_i one set for all adapters; a PHM adapter's B_i are whole and its A_i each
layer's own. Positions and trained norms are Houlsby's; Compacter++ has none after attention. S_i, T_i and B_i are
Xavier-uniform with gain sqrt(2), shared A_i normal of deviation 1e-4 and others 0.01, biases zero: near the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention, Method, Part, Select, Site
from deltatune.methods.houlsby import Sublayers
from deltatune.methods.tune import Tune
from deltatune.models.activations import ACTIVATIONS, check_activation


@dataclass(frozen=True, kw_only=True)
class PHMAdapter(Method):
    """`size`: the bottleneck m; `n`: the terms of H, which divides m and the width of the model; `norms`: the norms
    trained beside the adapters; None for none of them; `activation`: "gelu_tanh", the paper's, or one of Houlsby's."""

    lr: ClassVar[float] = 5e-3
    size: int = 24
    n: int = 4
    activation: str = "gelu_tanh"
    norms: Select = Part("norm")

    usual: ClassVar[tuple[str, ...]] = ("o", "down")
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size, self.n, k := getattr(self, "k", 1)) < 1 or self.size % self.n:
            raise DeltatuneError(f"{type(self).__name__}: size={self.size}, n={self.n}, {k=}: all >= 1, n divides size")
        check_activation(self)

    def parts(self) -> Sequence[Method]:
        adapters = self if self.targets is not None else replace(self, targets=Sublayers(self.usual))
        return (adapters,) if self.norms is None else (adapters, Tune(targets=self.norms))

    def build(self, site: Site, shared: nn.Module | None) -> Bottleneck:
        if (d := site.shape.out) % self.n:
            raise DeltatuneError(f"{type(self).__name__}: {site.path!r}: n={self.n} does not divide the width {d}")
        return Bottleneck(self.activation, *(self.layer(site, *s, shared) for s in ((d, self.size), (self.size, d))))

    def layer(self, site: Site, in_: int, out: int, shared: Any) -> nn.Module:
        return PHM(_rules(self.n, 0.01, site), in_, out, site)


@dataclass(frozen=True, kw_only=True)
class Compacter(PHMAdapter):
    """`k`: the rank of each B_i."""

    k: int = 1

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return _rules(self.n, 1e-4, sites[0])

    def layer(self, site: Site, in_: int, out: int, shared: Any) -> nn.Module:
        return LowRankPHM(shared, self.k, in_, out, site)


class CompacterPlusPlus(Compacter):
    usual = ("down",)


def _rules(n: int, std: float, site: Site) -> nn.Module:
    return nn.ParameterDict({"a": nn.init.normal_(torch.empty(n, n, n, **site.like), std=std)})


def _slices(n: int, rows: int, columns: int, site: Site) -> nn.Parameter:
    each = [nn.init.xavier_uniform_(torch.empty(rows, columns, **site.like), math.sqrt(2)) for _ in range(n)]
    return nn.Parameter(torch.stack(each))


class PHM(nn.Module):
    """`b` (n, in/n, out/n), `bias` (out,); `rules.a` (n, n, n)."""

    def __init__(self, rules: Any, in_: int, out: int, site: Site) -> None:
        super().__init__()
        n, self.rules, self.bias = len(rules.a), rules, nn.Parameter(torch.zeros(out, **site.like))
        self.b = _slices(n, in_ // n, out // n, site)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("iab,ice->acbe", self.rules.a, self.b)  # H, by its blocks
        return x @ h.flatten(2).flatten(0, 1) + self.bias


class LowRankPHM(nn.Module):
    """`s` (n, in/n, k), `t` (n, k, out/n), `bias` (out,)."""

    def __init__(self, rules: Any, k: int, in_: int, out: int, site: Site) -> None:
        super().__init__()
        n, self.rules, self.bias = len(rules.a), rules, nn.Parameter(torch.zeros(out, **site.like))
        self.s, self.t = _slices(n, in_ // n, k, site), _slices(n, k, out // n, site)

    def forward(self, x: Tensor) -> Tensor:  # without forming H
        h = torch.einsum("...ac,ick,iab->...bik", x.unflatten(-1, (len(self.s), -1)), self.s, self.rules.a)
        return torch.einsum("...bik,ike->...be", h, self.t).flatten(-2) + self.bias


class Bottleneck(Intervention):
    def __init__(self, activation: str, down: Any, up: Any) -> None:
        super().__init__()
        self.activation, self.down, self.up = ACTIVATIONS[activation], down, up

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Tensor:
        u = call(*args, **kwargs)
        return u + self.up(self.activation(self.down(u.to(self.down.bias.dtype)))).to(u.dtype)
