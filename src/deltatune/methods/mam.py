"""Mix-And-Match adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., 2022.
arXiv:2110.04366

Prefix tuning, with a short prefix, at every attention and a scaled parallel adapter at every feed-forward sublayer
(sec. 4.6). The defaults are the paper's for summarisation; its classifiers have length=16, size=16, scale=2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from deltatune.core import Method, Select
from deltatune.methods.parallel import ParallelAdapter
from deltatune.methods.prefix import PrefixTuning


@dataclass(frozen=True, kw_only=True)
class MAM(PrefixTuning):
    """`length`, `hidden` and `targets` are `PrefixTuning`'s; `size`, `scale` and `input` are `ParallelAdapter`'s."""

    lr: ClassVar[float] = 2e-4
    length: int = 30
    hidden: int | None = 800
    size: int = 512
    scale: float | Literal["learned"] = 4.0
    input: Select = None

    def parts(self) -> Sequence[Method]:
        return *super().parts(), *ParallelAdapter(size=self.size, scale=self.scale, input=self.input).parts()
