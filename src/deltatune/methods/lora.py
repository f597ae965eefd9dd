"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022. arXiv:2106.09685

    W' = W + s B A,    B in R^{out x r},  A in R^{r x in}                                  (eq. 3)

s = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
A is Kaiming-uniform and B zero, so W' = W at the start, unless `init` says otherwise. On an embedding, whose rows are
tokens, B A is (tokens, dim): the factor that the tokens index starts at zero, and there is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core import Awaiting, Base, Callback, DeltatuneError, Init, Method, Site, matching


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """`ranks` and `alphas` give modules their own r and alpha, by the first pattern that ends a module's path."""

    r: int = 8
    alpha: float = 16.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    init: Init | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, r in (("r", self.r), *self.ranks.items()):
            if r < 1:
                raise DeltatuneError(f"LoRA: the rank {name!r} must be at least 1, got {r}")
        if self.scaling not in ("alpha/r", "alpha/sqrt(r)"):
            raise DeltatuneError(f"LoRA: scaling is 'alpha/r' or 'alpha/sqrt(r)', got {self.scaling!r}")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"LoRA: dropout must lie in [0, 1), got {self.dropout}")

    def build(self, site: Site, shared: nn.Module | None) -> LowRank:
        r = matching(self.ranks, site.path, self.r)
        alpha = matching(self.alphas, site.path, self.alpha)
        s = alpha / (r if self.scaling == "alpha/r" else math.sqrt(r))
        delta = LowRank(site, r, s, self.dropout)
        if self.init is not None:
            self.init.start(delta, site)
        return delta

    def callbacks(self) -> Iterable[Callback]:
        return () if self.init is None else self.init.callbacks()


def taken_off(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) of B A - B0 A0 = (B - B0) A + B0 (A - A0): small terms, as a difference of large ones loses digits."""
    return torch.cat([b - b0, b0], 1), torch.cat([a, a - a0])


class LowRank(Awaiting):
    """`a` (r, in), `b` (out, r). `a0`, `b0`: a constant product taken off, for initialisations that start elsewhere."""

    roles = {"a": "down", "b": "up"}

    def __init__(self, site: Site, r: int, s: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.a = nn.Parameter(torch.empty(r, site.shape.in_, **site.like))
        self.b = nn.Parameter(torch.zeros(site.shape.out, r, **site.like))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.register_buffer("a0", None)
        self.register_buffer("b0", None)

    @torch.no_grad()
    def start_from(self, b: Tensor, a: Tensor) -> None:
        """Begin at s B A, minus the same constant, so that W' = W whatever the initialisation."""
        self.a.copy_(a)
        self.b.copy_(b)
        self.a0, self.b0 = self.a.detach().clone(), self.b.detach().clone()

    def product(self) -> tuple[Tensor, Tensor]:
        up, down, s = self.scaled_factors()
        return s * up, down

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        """B, A and s, apart: the fused node scales a product of few columns instead of a copy of B."""
        if self.a0 is None:
            return self.b, self.a, self.s
        return *taken_off(self.a, self.b, self.a0, self.b0), self.s

    @torch.no_grad()
    def unload(self, share: float = 1.0) -> None:
        """Keep `share` of the product as a constant, and shrink the factors by sqrt(1 - share): W' stays as it is."""
        training = self.training
        up, down = self.eval().product()  # where the two differ, a constant is what training has led to
        self.train(training).keep(share * up, down)
        self.constant.fold()  # type: ignore[union-attr]
        for t in (self.a, self.b, self.a0, self.b0):
            if t is not None:
                t.mul_(math.sqrt(1 - share))

    def added(self) -> tuple[Tensor, Tensor, float, float]:
        return *self.scaled_factors(), self.dropout.p if self.training else 0.0

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = self.outer(call).plus(x, *self.added())
        return super().forward(call, x, *args, **kwargs) if y is None else y

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Base, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or any(type(u) is not LowRank or u.constant is not None for u in units):
            return NotImplemented
        y = call.plus_in_rows(args[0], rows, [u.added() for u in units])
        return NotImplemented if y is None else y
