"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., ICML 2024. arXiv:2402.09353

    W' = m / ||W + dW||  (W + dW),   ||.|| the norm of each output row                     (eq. 5)

m, the magnitude, starts at ||W||; the norm is a constant in the backward pass (sec. 4.3). The bias is not scaled.
dW is any other delta: `DoRA(inner=LoRA(r=8))` is the paper. Dropout hides x from dW alone, so that the dense part stays
deterministic; PEFT and the authors' code hide it from (m / ||W + dW|| - 1) W x too, and so differ in training. On an
embedding, stored (tokens, dim), an output is a column of it, so the norm runs over the tokens. Where dW = U D, row by
row, without forming it,

    ||W + U D||^2 = ||W||^2 + <U, 2 W D' + U (D D')>
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Callback, Delta, DeltatuneError, Method, Site
from deltatune.methods.lora import LoRA, LowRank

_ROWS = 1024  # of a half-precision weight that are widened at a time
_TINY = 1e-18  # the least norm, so that a row of zeros stays one


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

    def callbacks(self) -> Iterable[Callback]:
        return self.inner.callbacks()


class Magnitude(Delta):
    """`m` (out,), around the `inner` delta."""

    roles = {"m": "scale"}
    undecayed = ("m",)

    def __init__(self, inner: Delta, site: Site) -> None:
        super().__init__()
        self.inner, self.dim = inner, 0 if isinstance(site.module, nn.Embedding) else 1
        self._kept: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None
        self.m = nn.Parameter(self.norm(site.weight).to(site.dtype))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    @torch.no_grad()
    def norm(self, w: Tensor) -> Tensor:
        """||W + dW||. From factors its relative error is the precision's times (||W|| / ||W + dW||)^2, which is near
        one; but factors of full rank can cancel W, and they save nothing."""
        wide, factors = torch.promote_types(w.dtype, torch.float32), self.inner.factors()
        with torch.autocast("cpu" if w.is_meta else w.device.type, enabled=False):  # products in full precision
            if factors is None or len(factors[1]) >= w.shape[self.dim]:
                return torch.linalg.vector_norm(self.inner.weight(w.to(wide)), dim=self.dim).clamp(min=_TINY)
            up, down = (f.to(wide) for f in factors)
            if self.dim == 0:
                w, up, down = w.T, down.T, up.T
            change = 2 * _by_rows(lambda rows: F.linear(rows, down), w, wide) + up @ (down @ down.T)
            return (self.squares(w, wide) + (up * change).sum(1)).clamp(min=_TINY**2).sqrt()

    def squares(self, w: Tensor, wide: torch.dtype) -> Tensor:
        """||W||^2, kept while W is the same parameter of the base in the same state: writing into it raises the version
        that autograd counts, moving and casting it change its place and type. Other weights are made anew each time:
        dequantised, or already under an adapter."""
        base = w if w._base is None else w._base
        if torch.compiler.is_compiling() or type(base) is not nn.Parameter or base.is_inference():
            return _by_rows(_squares, w, wide)
        state = base._version, w.data_ptr(), w.device, w.dtype, w.shape, w.stride()
        kept = self._kept
        if kept is None or kept[0]() is not base or kept[1] != state:
            kept = self._kept = weakref.ref(base), state, _by_rows(_squares, w, wide)
        return kept[2]

    def weight(self, w: Tensor) -> Tensor:
        return (self.m / self.norm(w)).unsqueeze(self.dim) * self.inner.weight(w)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        inner, magnitude = self.inner, self.m / self.norm(call.weight)
        if (
            isinstance(inner, LowRank)
            and type(inner).forward is LowRank.forward
            and (y := inner.outer(call).plus(x, *inner.added(), magnitude)) is not None
        ):
            return y
        y, bias = inner(call, x), call.bias
        # the magnitude itself, near one, would lose in half precision most of what it differs from one by
        beyond = (magnitude - 1).to(y.dtype)
        return y + beyond * (y if bias is None else y - bias.to(y.dtype))


def _squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).square()


def _by_rows(f: Callable[[Tensor], Tensor], w: Tensor, wide: torch.dtype) -> Tensor:
    """f(W) for a function of rows, without a copy of W in the wider precision."""
    return torch.cat([f(rows.to(wide)) for rows in w.split(len(w) if w.dtype == wide else _ROWS)])
