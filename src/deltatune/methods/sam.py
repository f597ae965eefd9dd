"""SAM, the second-order approximation method: On the Effectiveness of Parameter-Efficient Fine-Tuning. Fu et al., AAAI
2023. arXiv:2211.15583. It chooses what to train; it is not sharpness-aware minimisation, an optimizer of the same name.

    min_{D, M} L(theta) + g'(M * D) + 1/2 (M * D)' H (M * D),     H = diag(h)
    D_i = -g_i / h_i, which gains g_i^2 / (2 h_i):     M marks the largest |g_i^2 / h_i|

and, as in the authors' code, h is taken as constant, so M marks the int(density n) largest |g_i| in each tensor of n,
where g is the gradient of the loss on the whole set: signed gradients are summed before the absolute value, unlike
Fisher information. It is gathered at the base, which the authors' burn-in does not step from either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from torch import Tensor, nn

from deltatune.callbacks.selection import Once, Selection, Units, examples, total_over
from deltatune.core import Callback, DeltatuneError, Method, Run, Site
from deltatune.methods.coordinates import Coordinates, check_share, elements


@dataclass(frozen=True, kw_only=True)
class SAM(Method):
    """`density`: the share of each tensor that is trained, none of a tensor of fewer than 1 / density elements;
    `samples`: the examples that stand for the whole set."""

    lr: ClassVar[float] = 5e-3
    density: float = 0.005
    samples: int = 1024

    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density")
        if self.samples < 1:
            raise DeltatuneError(f"SAM: samples must be at least 1, got {self.samples}")

    def shared(self, sites: Sequence[Site]) -> None:
        if not any(int(self.density * elements(s)) for s in sites):
            raise DeltatuneError(f"SAM: density={self.density} leaves no place to train in these targets; raise it")

    def build(self, site: Site, shared: nn.Module | None) -> Coordinates:
        return Coordinates(site, int(self.density * elements(site)), self)

    def callbacks(self) -> Iterable[Callback]:
        return [Selection(method=self)]

    def begin(self, run: Run, units: Units) -> Once:
        return Once(units, self.choose)

    def choose(self, run: Run, units: Units) -> list[Tensor]:
        whole = total_over(run, units, islice(examples(run), self.samples), Tensor.add_)
        return [g.abs().topk(int(self.density * len(g))).indices.sort().values for g in whole]
