"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., ICML 2024. arXiv:2402.09353

    W' = m / ||W + dW||  (W + dW),   ||.|| the norm of each output row                     (eq. 5)

m, the magnitude, starts at ||W||; the norm is a constant in the backward pass (sec. 4.3). The bias is not scaled.
dW is any other delta: `DoRA(inner=LoRA(r=8))` is the paper. On an embedding, stored (tokens, dim), an output is a
column of it, so the norm runs over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site
from deltatune.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    inner: Method = field(default_factory=LoRA)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        return self.inner.shared(sites)

    def build(self, site: Site, shared: nn.Module | None) -> Magnitude:
        inner = self.inner.build(site, shared)
        if not isinstance(inner, Delta):
            raise DeltatuneError(f"DoRA: {type(self.inner).__name__} is no delta, so it has no weight to decompose")
        return Magnitude(inner, site)


class Magnitude(Delta):
    """`m` (out,), around the `inner` delta."""

    roles = {"m": "scale"}

    def __init__(self, inner: Delta, site: Site) -> None:
        super().__init__()
        self.inner, self.dim = inner, 0 if isinstance(site.module, nn.Embedding) else 1
        self.m = nn.Parameter(self.norm(site.weight).to(site.dtype))

    @torch.no_grad()
    def norm(self, w: Tensor) -> Tensor:
        with torch.autocast("cpu" if w.is_meta else w.device.type, enabled=False):  # products in full precision
            return torch.linalg.vector_norm(
                self.inner.weight(w.to(torch.promote_types(w.dtype, torch.float32))), dim=self.dim
            )

    def weight(self, w: Tensor) -> Tensor:
        return (self.m / self.norm(w)).unsqueeze(self.dim) * self.inner.weight(w)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        y, bias = self.inner(call, x), call.bias
        scale = (self.m / self.norm(call.weight)).to(y.dtype)
        return scale * y if bias is None else scale * (y - bias) + bias
