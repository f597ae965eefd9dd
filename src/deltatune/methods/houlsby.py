"""Houlsby adapters: Parameter-Efficient Transfer Learning for NLP. Houlsby et al., ICML 2019. arXiv:1902.00751

    u' = u + W_up gelu(W_down u + b_down) + b_up,   W_down in R^{m x d},  W_up in R^{d x m}     (sec. 2.1, fig. 2)

u is the output of a sublayer, attention or feed-forward, before dropout and the residual sum: two adapters a block.
Cross-attention has none. The norms' gains and biases are trained as well; a task head is one more method in a `Union`.
W_down is a normal of deviation 0.01 cut at two deviations and biases are zero, as in the paper; so is W_up with
`init=NearIdentity()`. Without, W_up is zero, and the model starts exactly at its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Init, Intervention, Method, Part, Select, Site, resolve
from deltatune.methods.tune import Tune
from deltatune.models.activations import ACTIVATIONS, Activation, check_activation


@dataclass(frozen=True, kw_only=True)
class NearIdentity(Init):
    """Both projections of a bottleneck small: normal of deviation `std`, cut at two deviations (sec. 3.6)."""

    std: float = 1e-2

    def __call__(self, delta: Any, w: Tensor) -> None:
        for p in (delta.down, delta.up):
            nn.init.trunc_normal_(p, std=self.std, a=-2 * self.std, b=2 * self.std)


@dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """`size`: the bottleneck m. `norms`: the norms trained beside the adapters; None for none of them.
    `activation`: "gelu_tanh", which is the paper's, "gelu", "relu" or "silu"."""

    lr: ClassVar[float] = 2e-3
    size: int = 64
    activation: str = "gelu_tanh"
    norms: Select = Part("norm")
    init: Init | None = None

    usual = ("o", "down")
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise DeltatuneError(f"Houlsby: size must be at least 1, got {self.size}")
        check_activation(self)

    def parts(self) -> Sequence[Method]:
        adapters = self if self.targets is not None else replace(self, targets=Sublayers(self.usual))
        return (adapters,) if self.norms is None else (adapters, Tune(targets=self.norms))

    def build(self, site: Site, shared: nn.Module | None) -> Bottleneck:
        unit = Bottleneck(site, self.size, ACTIVATIONS[self.activation])
        if self.init is not None:
            self.init(unit, site.weight)
        return unit


class Sublayers:
    """Selects the usual parts but those of cross-attention: made at the root, where a walk over a model begins."""

    def __init__(self, usual: tuple[str, ...]) -> None:
        self.usual = usual

    def __call__(self, path: str, module: nn.Module) -> bool:
        if not path:
            outputs = {m.path for m in resolve(module, None, self.usual)}
            crossed = tuple(f"{m.path}." for m in _cross_attention(module))
            self.paths = {p for p in outputs if not p.startswith(crossed)}
        return path in self.paths


def _cross_attention(model: nn.Module) -> Sequence[Any]:
    try:
        return resolve(model, Part("cross_attention"))
    except DeltatuneError:  # an architecture without
        return ()


class Bottleneck(Intervention):
    """`down` (m, d), `up` (d, m) and their biases, on the output (..., d) of a sublayer."""

    roles = {"down": "down", "up": "up"}

    def __init__(self, site: Site, size: int, activation: Activation) -> None:
        super().__init__()
        self.activation, d = activation, site.shape.out
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(size, d, **site.like), std=1e-2, a=-2e-2, b=2e-2))
        self.down_bias = nn.Parameter(torch.zeros(size, **site.like))
        self.up = nn.Parameter(torch.zeros(d, size, **site.like))
        self.up_bias = nn.Parameter(torch.zeros(d, **site.like))

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Tensor:
        u = call(*args, **kwargs)
        h = self.activation(F.linear(u.to(self.down.dtype), self.down, self.down_bias))
        return u + F.linear(h, self.up, self.up_bias).to(u.dtype)
