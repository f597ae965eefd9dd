"""Diff pruning: Parameter-Efficient Transfer Learning with Diff Pruning. Guo et al., ACL 2021. arXiv:2012.07463

    theta' = theta + z * w                                               z, w, alpha as large as theta
    z ~ hard concrete of alpha, see `hard_concrete`
    min  loss + lambda E||z||_0,     E||z||_0 = sum P(z > 0) = sum sigmoid(alpha - log(-l / r))

w = 0 and alpha = 5 at the start. Phase 1 trains both, with new gates in every forward pass; then the int(density N)
largest |z * w| of all N are kept, and phase 2 trains these without gates. In evaluation, and without callbacks, gates
are at their mean. The structured form, theta + z_g z * w, gates each tensor as well; its norm has both probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.callbacks.selection import Selection, TwoPhases, Units, at_rest, best, number, settle
from deltatune.core import Callback, Groups, Method, Run, Site
from deltatune.methods.coordinates import Coordinates, check_share, elements, resize
from deltatune.methods.hard_concrete import exceeds, mean, sampled


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """`l0`: lambda; `gated`: phase 1's share of the steps; `gated_lr`, `alpha_lr`: its rates, of w and alpha."""

    lr: ClassVar[float] = 3e-3
    density: float = 0.005
    l0: float = 1.25e-7
    gated: float = 0.5
    gated_lr: float = 2e-4
    alpha_lr: float = 0.1

    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density", "gated")

    def build(self, site: Site, shared: nn.Module | None) -> Gated:
        return Gated(site, self)

    def callbacks(self) -> Iterable[Callback]:
        return [Selection(method=self)]

    def begin(self, run: Run, units: Units) -> TwoPhases:
        return _Pruning(self, self.gated, run, units, self.gated_lr)


class StructuredDiffPruning(DiffPruning):
    def build(self, site: Site, shared: nn.Module | None) -> Gated:
        return Gated(site, self, groups=1)


class Gated(Coordinates):
    """`values` = w and `alpha`, both (n,), and `group` (groups,), the alpha of z_g; pruned, the alphas are empty."""

    grows: ClassVar[tuple[str, ...]] = (*Coordinates.grows, "alpha", "group")

    def __init__(self, site: Site, method: Method, groups: int = 0) -> None:
        super().__init__(site, elements(site), method)
        self.sampling = False
        self.alpha = nn.Parameter(torch.full((self.size,), 5.0, **site.like))
        self.group = nn.Parameter(torch.full((groups,), 5.0, **site.like)) if groups else None

    def alphas(self) -> list[nn.Parameter]:
        return [a for a in (self.alpha, self.group) if a is not None]

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        super().expect(shapes)
        for name in ("alpha", "group"):
            if name in shapes:
                resize(getattr(self, name), *shapes[name])

    def difference(self) -> Tensor:
        d: Tensor = self.values
        for alpha in self.alphas() if len(self.alpha) else ():
            d = d * (sampled(alpha) if self.sampling and self.training else mean(alpha))
        return d

    def expected_l0(self) -> Tensor:
        alone = exceeds(self.alpha, 0).sum()
        return alone if self.group is None else alone * exceeds(self.group, 0).sum()


class _Pruning(TwoPhases):
    def param_groups(self, groups: Groups) -> Groups:
        mine = {id(a) for u in self.units for a in u.alphas()}
        split: Groups = []
        for g in super().param_groups(groups):
            rest, alphas = ([p for p in g["params"] if (id(p) in mine) is own] for own in (False, True))
            split += [{**g, "params": rest}, {**g, "params": alphas, "lr": self.method.alpha_lr, "weight_decay": 0.0}]
        return split

    def on_train_start(self, run: Run) -> None:
        super().on_train_start(run)
        for u in self.units:
            u.sampling = True

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        norm = sum(u.expected_l0().to(loss.device) for u in self.units if len(u.alpha))
        return loss + self.method.l0 * run.share * norm

    def choose(self) -> None:
        with at_rest(self.run.model):
            learned = [u.difference() for u in self.units]
        settle(self.units, best([d.abs() for d in learned], number(self.units, self.method.density)))
        for u, d in zip(self.units, learned, strict=True):
            u.values.copy_(d[u.indices.long()])
            for alpha in u.alphas():
                resize(alpha, 0)

    def on_train_end(self, run: Run) -> None:
        for u in self.units:
            u.sampling = False
