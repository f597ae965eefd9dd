"""FISH Mask: Training Neural Networks with Fixed Sparse Masks. Sung et al., NeurIPS 2021. arXiv:2111.09839

    F_i = (1/n) sum_{j=1..n} (d log p(y_j | x_j) / d theta_i)^2
    theta' = theta + M * D,     M marks the int(density N) largest F_i of all N parameters

The empirical Fisher information of the base, of single examples' gradients, before the first step; M is then fixed. The
paper masks every parameter of the model but the head, which is trained whole (add `Tune`) and counts in its budget; the
targets here are by default the linear layers of the blocks, with their biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.callbacks.selection import Once, Selection, Units, best, examples, number, squares, total_over
from deltatune.core import Callback, DeltatuneError, Method, Run, Site
from deltatune.methods.coordinates import Budget, Coordinates, check_share


@dataclass(frozen=True, kw_only=True)
class FishMask(Method):
    """`density`: the share of the targets' parameters that is trained; `samples`: n."""

    lr: ClassVar[float] = 3e-3
    density: float = 0.005
    samples: int = 1024

    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density")
        if self.samples < 1:
            raise DeltatuneError(f"{type(self).__name__}: samples must be at least 1, got {self.samples}")

    def shared(self, sites: Sequence[Site]) -> nn.Module:
        return Budget(self.density, sites)

    def build(self, site: Site, shared: Any) -> Coordinates:
        return Coordinates(site, shared.of(site), self)

    def callbacks(self) -> Iterable[Callback]:
        return [Selection(method=self)]

    def begin(self, run: Run, units: Units) -> Once:
        return Once(units, self.choose)

    def choose(self, run: Run, units: Units) -> list[Tensor]:
        fisher = total_over(run, units, islice(examples(run), self.samples), squares)
        return best(fisher, number(units, self.density))
