"""Pfeiffer adapters: AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., EACL 2021.
arXiv:2005.00247

    f(x) = W_up relu(W_down x + b_down) + b_up,   W_down in R^{m x d},  W_up in R^{d x m}
    norms before the sublayers:    x = u + h1,       h2 = f(x) + u + h1
    norms after the sums:          x = LN(u + h1),   h2 = LN(f(x) + u + h1)

u is the output of a block's feed-forward sublayer, after dropout, h1 the stream it is added to: one adapter a block.
The residual is taken before the norm: the block's own LN, frozen, runs twice; with W_up = 0, the start, the model is
its base exactly. With `init=NearIdentity(std=0.02)` it starts near it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention, Method, Part, Select, Site
from deltatune.methods.houlsby import NearIdentity
from deltatune.models.activations import ACTIVATIONS, check_activation
from deltatune.models.anatomy import hidden, parts

Core = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Method):
    """`size`: the bottleneck m; `activation`: the paper's, or another of Houlsby's. `targets`: the norms that end the
    blocks, or, where norms precede the sublayers, the blocks themselves."""

    lr: ClassVar[float] = 2e-3
    size: int = 48
    activation: str = "relu"
    init: NearIdentity | None = None

    usual = ("post_norm",)
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise DeltatuneError(f"Pfeiffer: size must be at least 1, got {self.size}")
        check_activation(self)

    def select(self, model: nn.Module) -> Select:
        return Part("post_norm" if "post_norm" in parts(model) else "block") if self.targets is None else self.targets

    def build(self, site: Site, shared: nn.Module | None) -> Bottleneck:
        kind = AtNorm if getattr(getattr(site.module, "weight", None), "ndim", 0) == 1 else AtBlock
        unit = kind(site, _width(site), self.size, self.activation)
        if self.init is not None:
            self.init(unit, unit.up)
        return unit


def _width(site: Site) -> int:
    """d: of a norm's gain, else as the configuration says that is nearest, a model of two towers having two."""
    if isinstance(getattr(site.module, "weight", None), Tensor):
        return site.shape.out
    config = next((m.config for m in site.module.modules() if hasattr(m, "config")), site.config)
    if config is None:
        raise DeltatuneError(f"Pfeiffer: {site.path!r}: a {type(site.module).__name__} without a configuration does "
                             "not say its width; target a norm or a linear layer")  # fmt: skip
    return hidden(config)


class Bottleneck(Intervention):
    """`down` (m, d), `up` (d, m) and their biases, after the residual sum of a block."""

    roles = {"down": "down", "up": "up"}

    def __init__(self, site: Site, d: int, m: int, activation: str = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Parameter(nn.init.normal_(torch.empty(m, d, **site.like), std=0.02))
        self.up = nn.Parameter(torch.zeros(d, m, **site.like))
        self.down_bias, self.up_bias = (nn.Parameter(torch.zeros(n, **site.like)) for n in (m, d))

    def core(self, x: Tensor) -> Tensor:
        h = self.activation(F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return F.linear(h, self.up, self.up_bias).to(x.dtype)

    @staticmethod
    def around(core: Core, call: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's output with `core` in place."""
        raise NotImplementedError

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.core, call, *args, **kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        def core(x: Tensor) -> Tensor:  # a block may write to a cache that all rows share
            y = torch.zeros_like(x)
            for i, unit in enumerate(units):
                mine = (rows == i).nonzero().flatten()
                y = y.index_copy(0, mine, unit.core(x.index_select(0, mine)))
            return y

        return cls.around(core, call, *args, **kwargs)


class AtNorm(Bottleneck):
    @staticmethod
    def around(core: Core, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        (total,) = args  # u + h1
        return call(total + core(call(total)))


class AtBlock(Bottleneck):
    @staticmethod
    def around(core: Core, call: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        return (y[0] + core(y[0]), *y[1:]) if isinstance(y, tuple) else y + core(y)
