"""LoKr: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation. Yeh et al., ICLR 2024.
arXiv:2309.14859

    W' = W + s (W1 (x) W2),    W1 in R^{l x m},  W2 in R^{k x n},  l k = out,  m n = in,  s = alpha / r

(x) is the Kronecker product; `factor` says how out and in are split, l <= k and m <= n. A factor named in `decompose`
is itself a product, W2 = W2_a W2_b through r, unless r is at least half its longer side. On a convolution n counts
channels and W2 carries the kernel. W1 is Kaiming-uniform, and W2, or W2_b of it, zero, so W' = W at the start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site
from deltatune.methods.krona import kron_linear, split

_FACTORS = ("w1", "w2")


@dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """`factor`: the smaller part of out and of in, where it divides them; -1 for parts as equal as can be.
    `decompose`: which of "w1" and "w2" are products through r; none of them, and this is KronA."""

    lr: ClassVar[float] = 5e-3
    r: int = 8
    alpha: float = 8.0
    factor: int = -1
    decompose: tuple[str, ...] = ("w2",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise DeltatuneError(f"LoKr: r must be at least 1, got {self.r}")
        if self.factor != -1 and self.factor < 1:
            raise DeltatuneError(f"LoKr: factor must be at least 1, or -1 for parts as equal as can be: {self.factor}")
        if wrong := [name for name in self.decompose if name not in _FACTORS]:
            raise DeltatuneError(f"LoKr: decompose names 'w1' and 'w2', got {wrong[0]!r}")

    def build(self, site: Site, shared: nn.Module | None) -> Product:
        convolution = isinstance(site.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        kernel = math.prod(site.module.weight.shape[2:]) if convolution else 1  # type: ignore[operator, arg-type, union-attr, index]
        l, k = split(site.shape.out, self.factor)
        m, n = split(site.shape.in_ // kernel, self.factor)
        through = {
            name: name in self.decompose and 2 * self.r < max(sides)
            for name, sides in zip(_FACTORS, ((l, m), (k, n)), strict=True)
        }
        return Product(site, (l, m), (k, n * kernel), self.r, self.alpha / self.r, through)


class Product(Delta):
    """`w1` (l, m) or `w1_a` (l, r) and `w1_b` (r, m); `w2` (k, n) or `w2_a` (k, r) and `w2_b` (r, n)."""

    roles = {"w1_a": "up", "w1_b": "down", "w2_a": "up", "w2_b": "down"}

    def __init__(self, site: Site, w1: tuple[int, int], w2: tuple[int, int], r: int, s: float,
                 through: dict[str, bool]) -> None:  # fmt: skip
        super().__init__()
        self.s = s
        for name, (rows, columns) in zip(_FACTORS, (w1, w2), strict=True):
            shapes = {f"{name}_a": (rows, r), f"{name}_b": (r, columns)} if through[name] else {name: (rows, columns)}
            for n, shape in shapes.items():
                p = torch.zeros(*shape, **site.like)
                if n not in ("w2", "w2_b"):
                    nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                self.register_parameter(n, nn.Parameter(p))

    def factor(self, name: str) -> list[Tensor]:
        """The matrices whose product the factor is."""
        if hasattr(self, name):
            return [getattr(self, name)]
        return [getattr(self, f"{name}_a"), getattr(self, f"{name}_b")]

    def weight(self, w: Tensor) -> Tensor:
        w1, w2 = (f[0] if len(f) == 1 else f[0] @ f[1] for f in map(self.factor, _FACTORS))
        return w + torch.kron(self.s * w1, w2)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        (first, *rest), w2 = self.factor("w1"), self.factor("w2")
        y = call(x)
        return y + kron_linear(x.to(first.dtype), [self.s * first, *rest], w2).to(y.dtype)
