"""(IA)^3: Infused Adapter by Inhibiting and Amplifying Inner Activations. Liu et al., NeurIPS 2022. arXiv:2205.05638

    y' = l * (W x + b)      where l rescales an output: the keys and the values            (sec. 3.3)
    y' = W (l * x) + b      where l rescales an input: that of the second feed-forward projection

l starts at one. Weight decay, which would pull it to zero and not to one, leaves it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Base, Delta, Method, Part, Select, Site, resolve


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """`on_input`: those of the targets whose input is rescaled instead of their output; None for none of them."""

    lr: ClassVar[float] = 3e-2
    on_input: Select = Part("down")

    usual = ("k", "v", "down")

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        inputs = set() if self.on_input is None else {m.path for m in resolve(site.model, self.on_input)}
        return ScaledInput(site) if site.path in inputs else ScaledOutput(site)


class ScaledOutput(Delta):
    """`l` (out,)."""

    roles = {"l": "scale"}
    undecayed = ("l",)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.shape.out, **site.like))

    def weight(self, w: Tensor) -> Tensor:
        return self.l[:, None] * w

    def bias(self, b: Tensor) -> Tensor:
        return self.l * b

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        y = call(x)
        return y * self.l.to(y.dtype)


class ScaledInput(Delta):
    """`l` (in,)."""

    roles = {"l": "scale"}
    undecayed = ("l",)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.shape.in_, **site.like))

    def weight(self, w: Tensor) -> Tensor:
        return w * self.l

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        return call(x * self.l.to(x.dtype)) if call.is_linear else super().forward(call, x, *args, **kwargs)
