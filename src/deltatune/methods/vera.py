"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., ICLR 2024. arXiv:2310.11454

    W' = W + diag(b) B diag(d) A,    B in R^{out x r},  A in R^{r x in}                    (eq. 2)

A and B are random, frozen, and one pair for all sites; a site trains b in R^out and d in R^r. b is zero, so W' = W at
the start; d is `d_initial`; A and B are Kaiming-uniform. Where sites differ in size, the pair has the largest and each
site takes the first rows and columns that it needs, as PEFT does (the paper's sites are all of one size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Delta, DeltatuneError, Method, Site
from deltatune.inits.seeded import uniform


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """A and B are stored as `seed`, which gives the same numbers on every machine; `save_projection` writes them as
    tensors too, which an adapter with A and B from elsewhere needs."""

    lr: ClassVar[float] = 5e-2
    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    save_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise DeltatuneError(f"VeRA: r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"VeRA: dropout must lie in [0, 1), got {self.dropout}")

    def shared(self, sites: Sequence[Site]) -> Projections:
        shapes = [site.shape for site in sites]
        out, in_ = max(s.out for s in shapes), max(s.in_ for s in shapes)
        return Projections(out, in_, self, dtype=sites[0].dtype, device=sites[0].device)

    def build(self, site: Site, shared: nn.Module | None) -> Vectors:
        assert isinstance(shared, Projections)
        return Vectors(site, shared, self)


class Projections(nn.Module):
    """A (r, in) and B (out, r), the largest that any site needs."""

    a: Tensor
    b: Tensor

    def __init__(self, out: int, in_: int, method: VeRA, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for name, rows, fan_in in (("a", method.r, in_), ("b", out, method.r)):
            drawn = uniform(f"vera/{method.seed}/{name}", rows * fan_in, device).view(rows, fan_in)
            values = (2 * drawn - 1) * math.sqrt(6 / fan_in)
            self.register_buffer(name, values.to(dtype), persistent=method.save_projection)


class Vectors(Delta):
    """`b` (out,), `d` (r,), around the shared A and B."""

    roles = {"b": "scale", "d": "scale"}

    def __init__(self, site: Site, projections: Projections, method: VeRA) -> None:
        super().__init__()
        self.projections = projections
        self.b = nn.Parameter(torch.zeros(site.shape.out, **site.like))
        self.d = nn.Parameter(torch.full((method.r,), method.d_initial, **site.like))
        self.dropout = nn.Dropout(method.dropout)
        self.out, self.in_ = site.shape.out, site.shape.in_

    def projected(self) -> tuple[Tensor, Tensor]:
        """B and A of this site's size, views of the shared ones where these are on its device."""
        return self.projections.b[: self.out].to(self.b), self.projections.a[:, : self.in_].to(self.d)

    def factors(self) -> tuple[Tensor, Tensor]:
        b, a = self.projected()
        return self.b[:, None] * b, self.d[:, None] * a

    def weight(self, w: Tensor) -> Tensor:
        up, down = self.factors()
        return w + up @ down

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            y = call.plus(x, *self.factors(), dropout=self.dropout.p if self.training else 0.0)
            return super().forward(call, x, *args, **kwargs) if y is None else y
        (b, a), h = self.projected(), self.dropout(x.to(self.d.dtype))
        update = self.b * F.linear(self.d * F.linear(h, a), b)  # the vectors scale activations, not the matrices
        y = call(x)
        return y + update.to(y.dtype)
