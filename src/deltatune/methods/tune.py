"""Train chosen parameters as they are, as a copy that stands in for the base's: W' = V, V starting at W.

For a task head, norms, embeddings: what PEFT calls `modules_to_save`. The base is left untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deltatune.core import Delta, Method, Site


@dataclass(frozen=True, kw_only=True)
class Tune(Method):
    usual = ("head",)
    at: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def build(self, site: Site, shared: nn.Module | None) -> Copy:
        return Copy(site)


class Copy(Delta):
    """`v`, shaped as the parameter it replaces, (out, in) or (out,)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.v = nn.Parameter(site.weight.to(site.dtype, copy=True))

    def weight(self, w: Tensor) -> Tensor:
        return self.v
