"""A sparse difference, the building block of the selective methods: W' = W + S, where S is zero but at chosen places.

    vec(W')_i = vec(W)_i + v_j,     dL/dv_j = (dL/dW')_i     where i = indices_j

The base is never written, so outside its places W' is W bit for bit, under any optimizer and any weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site


class Coordinates(Delta):
    """`indices` (k,): places in the flattened weight; `values` (k,): what is added there, zero at first.

    `chosen`: whether the places are those that `method` asks for; until data was seen they are spread evenly.
    `watch`: stands in for W', which it is given a way to make, so that somebody can ask for its dense gradient."""

    indices: Tensor
    chosen: Tensor
    grows: ClassVar[tuple[str, ...]] = ("indices", "values")

    def __init__(self, site: Site, k: int, method: Method) -> None:
        super().__init__()
        self.size, self.method = elements(site), method
        self.watch: Callable[[Callable[[], Tensor]], Tensor] | None = None
        self.values = nn.Parameter(torch.zeros(k, **site.like))
        spread = torch.arange(k, device=site.device) * self.size // max(k, 1)
        self.register_buffer("indices", spread.int() if self.size < 2**31 else spread)
        self.register_buffer("chosen", torch.tensor(False, device=site.device))

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        if (k := shapes.get("values", ())) != shapes.get("indices") or len(k) != 1:
            raise DeltatuneError(f"a sparse difference needs one value at each of its indices, got {dict(shapes)}")
        self.indices = self.indices.new_zeros(k)
        resize(self.values, *k)

    @torch.no_grad()
    def move_to(self, indices: Tensor) -> None:
        """Train other places, from zero on."""
        self.indices = indices.to(self.indices)
        resize(self.values, len(indices))

    def difference(self) -> Tensor:
        """(k,): what is added to the weight at `places`."""
        return self.values

    def places(self) -> Tensor:
        """(k,): distinct places in the flattened weight."""
        return self.indices

    def weight(self, w: Tensor) -> Tensor:
        v = self.difference()
        if self.watch is not None:
            return self.watch(lambda: _added(w, v, self.places()) if v.any() else w)
        wide = torch.promote_types(w.dtype, v.dtype)
        return w.to(wide).reshape(-1).index_add(0, self.places(), v.to(wide)).view(w.shape)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear or self.watch is not None:
            return super().forward(call, x, *args, **kwargs)
        return _Linear.apply(x, call.weight, call.bias, self.difference(), self.places())


class _Linear(torch.autograd.Function):
    """x W'^T + b. The backward pass forms W' again, so that no copy of W waits for it, and gathers from dL/dW' at once.

    x (..., in), w (out, in), b (out,) or None, v and i (k,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, v: Tensor, i: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, v, i)
        return F.linear(x, _added(w, v, i).to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, v, i = ctx.saved_tensors
        gx = gw = gb = gv = None
        if ctx.needs_input_grad[0]:
            gx = (gy @ _added(w, v, i).to(gy.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            gw = gy.reshape(-1, gy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(gy.dtype)
            gv = gw.reshape(-1).index_select(0, i).to(v.dtype)
        if ctx.needs_input_grad[2]:
            gb = gy.reshape(-1, gy.shape[-1]).sum(0)
        return gx, gw.to(w.dtype) if ctx.needs_input_grad[1] else None, gb, gv, None  # type: ignore[union-attr]


def _added(w: Tensor, v: Tensor, i: Tensor) -> Tensor:
    """W' in the precision of W: the sums are made in the wider one and rounded, as merging does."""
    flat, wide = w.reshape(-1), torch.promote_types(w.dtype, v.dtype)
    sums = flat.index_select(0, i).to(wide) + v.to(wide)
    return flat.index_copy(0, i.long(), sums.to(w.dtype)).view(w.shape)


@torch.no_grad()
def resize(p: nn.Parameter, *shape: int) -> None:
    """Make `p` zeros of that shape, still the same parameter of the same optimizer."""
    p.grad = None
    p.data = p.new_zeros(shape)


def elements(site: Site) -> int:
    """The elements of the parameter at a site."""
    return site.shape.out * site.shape.in_


class Budget(nn.Module):
    """How many places each of the sites gets before they are chosen: its share of int(density N), N being all of them.

    Raises DeltatuneError when that is none at all."""

    def __init__(self, density: float, sites: Sequence[Site]) -> None:
        super().__init__()
        ends = [int(density * n) for n in accumulate(map(elements, sites), initial=0)]
        self.counts = {id(site): end - start for site, (start, end) in zip(sites, pairwise(ends), strict=True)}
        if not ends[-1]:
            raise DeltatuneError(f"density={density} leaves no place to train in these targets; raise it")

    def of(self, site: Site) -> int:
        return self.counts[id(site)]


def check_share(method: Method, *names: str) -> None:
    """Raises DeltatuneError unless each of these options lies in (0, 1]."""
    for name in names:
        if not 0 < (value := getattr(method, name)) <= 1:
            raise DeltatuneError(f"{type(method).__name__}: {name} must lie in (0, 1], got {value}")
