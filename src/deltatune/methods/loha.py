"""LoHa: FedPara's low-rank Hadamard product (Hyeon-Woo et al., ICLR 2022, arXiv:2108.06098) as an adapter: LyCORIS, Yeh
et al., ICLR 2024. arXiv:2309.14859

    W' = W + s (W1_a W1_b) * (W2_a W2_b),    W._a in R^{out x r},  W._b in R^{r x in},  s = alpha / r

* is the product entry by entry, so the rank is up to r^2 for the parameters of a LoRA of rank 2 r. It is itself low
rank, U D with the rows of U the Kronecker products of those of W1_a and W2_a, and the columns of D alike, which costs
less than the matrix as long as r^2 (out + in) <= out in. W1_a, W1_b and W2_b are normal with deviations 0.1, 1 and 1,
and W2_a is zero, so W' = W at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site


@dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    lr: ClassVar[float] = 5e-3
    r: int = 4
    alpha: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise DeltatuneError(f"LoHa: r must be at least 1, got {self.r}")

    def build(self, site: Site, shared: nn.Module | None) -> HadamardProduct:
        return HadamardProduct(site, self.r, self.alpha / self.r)


class HadamardProduct(Delta):
    """`w1_a`, `w2_a` (out, r), `w1_b`, `w2_b` (r, in)."""

    roles = {"w1_a": "up", "w2_a": "up", "w1_b": "down", "w2_b": "down"}

    def __init__(self, site: Site, r: int, s: float) -> None:
        super().__init__()
        self.s, (out, in_) = s, (site.shape.out, site.shape.in_)
        self.w1_a = nn.Parameter(torch.empty(out, r, **site.like).normal_(std=0.1))
        self.w1_b = nn.Parameter(torch.empty(r, in_, **site.like).normal_())
        self.w2_a = nn.Parameter(torch.zeros(out, r, **site.like))
        self.w2_b = nn.Parameter(torch.empty(r, in_, **site.like).normal_())
        self.factored = r * r * (out + in_) <= out * in_

    def factors(self) -> tuple[Tensor, Tensor]:
        up = (self.w1_a[:, :, None] * self.w2_a[:, None, :]).flatten(1)
        return self.s * up, (self.w1_b[:, None] * self.w2_b[None]).flatten(0, 1)

    def weight(self, w: Tensor) -> Tensor:
        # a product of four small numbers underflows in half precision
        with torch.autocast("cpu" if w.is_meta else w.device.type, enabled=False):
            product: Tensor = Hadamard.apply(self.w1_a, self.w1_b, self.w2_a, self.w2_b)  # type: ignore[no-untyped-call]
            return w + self.s * product

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self.factored:
            up, down = self.factors()
            update = call.low_rank(x.to(down.dtype) if x.is_floating_point() else x, up, down)
            if update is not None:
                y = call(x)
                return y + update.to(y.dtype)
        return super().forward(call, x, *args, **kwargs)


class Hadamard(torch.autograd.Function):
    """(A1 B1) * (A2 B2). The backward pass forms the two products again, one at a time, instead of keeping both."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a1, b1, a2, b2 = ctx.saved_tensors
        g = grads[0] * (a2 @ b2)
        first = g @ b1.T, a1.T @ g
        g = grads[0] * (a1 @ b1)
        return *first, g @ b2.T, a2.T @ g
