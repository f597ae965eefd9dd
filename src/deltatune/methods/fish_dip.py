"""FISH-DIP: Unified Low-Resource Sequence Labeling by Sample-Aware Dynamic Sparse Finetuning. Das et al., EMNLP 2023.
arXiv:2311.03748

    every T steps   H = the n training examples with the largest loss
                    F_i = sum_{j in H} (d log p(y_j | x_j) / d theta_i)^2
                    M marks the int(density N) largest F_i of all N parameters

FISH Mask, with a mask that follows what the model still gets wrong. What a place has learned stays when the mask leaves
it, so the difference is less sparse than one mask. A refresh starts the optimizer's moments anew, for old ones would go
on moving, or overshoot, places whose mask has changed. It runs over all training examples: a method for small data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.callbacks.selection import (
    Selection,
    Units,
    best,
    forget,
    hardest,
    is_chosen,
    number,
    settle,
    squares,
    total_over,
)
from deltatune.core import Callback, DeltatuneError, Events, Method, Run, Site
from deltatune.methods.coordinates import Budget, Coordinates, check_share


@dataclass(frozen=True, kw_only=True)
class FishDip(Method):
    """`every`: T. `hardest`: n; the authors' code takes a tenth of the number of batches, within 3 and 25."""

    density: float = 0.01
    every: int = 100
    hardest: int = 25

    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density")
        if self.every < 1 or self.hardest < 1:
            raise DeltatuneError(f"FishDip: every={self.every}, hardest={self.hardest}: give at least 1")

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return Budget(self.density, sites)

    def build(self, site: Site, shared: Any) -> Exchanging:
        return Exchanging(site, shared.of(site), self)

    def callbacks(self) -> Iterable[Callback]:
        return [Selection(method=self)]

    def begin(self, run: Run, units: Units) -> Events:
        for u in units:
            u.values.requires_grad_()  # the optimizer needs even those that have no place yet
        return _Refreshes(self, units)


class Exchanging(Coordinates):
    """`kept_indices`, `kept_values` (m,): what was learned at places that are not trained now."""

    kept_indices: Tensor
    kept_values: Tensor
    grows: ClassVar[tuple[str, ...]] = (*Coordinates.grows, "kept_indices", "kept_values")

    def __init__(self, site: Site, k: int, method: Method) -> None:
        super().__init__(site, k, method)
        self.register_buffer("kept_indices", self.indices[:0].clone())
        self.register_buffer("kept_values", torch.zeros(0, **site.like))

    def expect(self, shapes: Any) -> None:
        super().expect({n: shapes[n] for n in Coordinates.grows if n in shapes})
        self.kept_indices = self.indices.new_zeros(shapes["kept_indices"])
        self.kept_values = self.kept_values.new_zeros(shapes["kept_values"])

    def places(self) -> Tensor:
        return torch.cat([self.indices, self.kept_indices])

    def difference(self) -> Tensor:
        return torch.cat([self.values, self.kept_values])

    @torch.no_grad()
    def move_to(self, indices: Tensor) -> None:
        """Train these places from what they have learned, and keep what others have: W' does not change."""
        whole = self.values.new_zeros(self.size).index_copy(0, self.places().long(), self.difference())
        super().move_to(indices)
        self.values.copy_(whole[indices])
        whole[indices] = 0
        left = whole.nonzero().flatten()
        self.kept_indices, self.kept_values = left.to(self.indices), whole[left]


class _Refreshes(Events):
    def __init__(self, method: FishDip, units: Units) -> None:
        self.method, self.units = method, units

    def on_train_start(self, run: Run) -> None:
        if run.step == 0 and not is_chosen(self.units):
            self._refresh(run)

    def on_step_end(self, run: Run) -> None:
        if run.step % self.method.every == 0 and run.step < run.steps:
            self._refresh(run)

    def _refresh(self, run: Run) -> None:
        fisher = total_over(run, self.units, hardest(run, self.units, self.method.hardest), squares)
        settle(self.units, best(fisher, number(self.units, self.method.density)))
        forget(run, [u.values for u in self.units])
