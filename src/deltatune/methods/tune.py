"""Train chosen parameters as they are, as a copy that stands in for the base's: W' = V, V starting at W.

For a task head, norms, embeddings: what PEFT calls `modules_to_save`. The base is left untouched. A head may tell other
classes apart than the base's: its last layer, (classes, d), then has a row for each of `labels`, drawn anew where they
are not as many as the base has; so adapters of several tasks share one base, each with its own head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Delta, DeltatuneError, Layers, Method, Select, Site, resolve
from deltatune.core.select import Match
from deltatune.models.anatomy import classifier


@dataclass(frozen=True, kw_only=True)
class Tune(Method):
    """`labels`: the names of the classes that the trained head tells apart; () for those of the base."""

    lr: ClassVar[float] = 2e-4
    usual = ("head",)
    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.labels, str) or len(set(self.labels)) < len(self.labels):
            raise DeltatuneError(f"Tune: labels = {self.labels!r} must be a list of different names")

    def select(self, model: nn.Module) -> Select:
        if self.labels:
            head = head_of(model, self.labels)
            if all(match.path != head for match in resolve(model, self.targets, self.usual)):
                raise DeltatuneError(f"Tune: labels are those of {head!r}, which targets = {self.targets!r} leave out")
        return self.targets

    def build(self, site: Site, shared: nn.Module | None) -> Copy:
        return Copy(site, len(self.labels) if self.labels and site.path == classifier(site.model) else None)

    def classes(self) -> tuple[str, ...]:
        return self.labels


def head_of(model: nn.Module, labels: tuple[str, ...]) -> str:
    """The path of the layer that tells classes apart; raises DeltatuneError where there is none."""
    if (path := classifier(model)) is None:
        some = f"{', '.join(labels[:3])}{', …' if len(labels) > 3 else ''}"
        raise DeltatuneError(
            f"{type(model).__name__} has no head that tells classes ({some}) apart: load the base with one, by "
            "AutoModelForSequenceClassification or AutoModelForTokenClassification"
        )
    return path


@dataclass(frozen=True, kw_only=True)
class Beside(Layers):
    """Modules of `targets` but those at `whole`, which `Tune` trains whole: another change of them had no effect."""

    whole: tuple[str, ...]

    def among(self, found: list[Match]) -> list[Match]:
        return [m for m in found if m.path not in self.whole]


class Copy(Delta):
    """`v`, shaped as the parameter it replaces, (out, in) or (out,), but for the number of `rows`, if that is given."""

    undecayed = ("v",)

    def __init__(self, site: Site, rows: int | None = None) -> None:
        super().__init__()
        start = site.weight.to(site.dtype, copy=True)
        if rows not in (None, len(start)):
            start = torch.zeros(rows, *start.shape[1:], **site.like)  # type: ignore[arg-type]
            if start.ndim > 1:
                start.normal_(std=getattr(site.config, "initializer_range", 0.02))
        self.v = nn.Parameter(start)

    def weight(self, w: Tensor) -> Tensor:
        return self.v
