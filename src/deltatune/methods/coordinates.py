"""A sparse difference, the building block of the selective methods: W' = W + S, where S is zero but at chosen places.

    vec(W')_i = vec(W)_i + v_j,     dL/dv_j = (dL/dW')_i     where i = indices_j

The base is never written, so outside its places W' is W bit for bit, under any optimizer and any weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site
from deltatune.kernels.sparse_linear import added, sparse_linear


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
            return self.watch(lambda: added(w, v, self.places()) if v.any() else w)
        wide = torch.promote_types(w.dtype, v.dtype)
        return w.to(wide).reshape(-1).index_add(0, self.places(), v.to(wide)).view(w.shape)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear or self.watch is not None:
            return super().forward(call, x, *args, **kwargs)
        return sparse_linear(x, call.weight, call.bias, self.difference(), self.places())


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
