"""DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation.
Valipour et al., EACL 2023. arXiv:2210.07558

    W' = W + (alpha / b) B[:, :b] A[:b],    B in R^{out x r},  A in R^{r x in}             (alg. 1)

Each step draws b, the same for all sites, uniformly from r_min..r. `update` says what learns in it: "frozen", the
authors' code's, row b of A and column b of B alone; "full", the first b of each. So the first b ranks are a LoRA of
rank b for every b, which `truncate` takes out; in evaluation b = r. A is Kaiming-uniform and B zero. A gradient is
zero, not absent, where nothing learns: momentum and weight decay still act there, as they do in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.callbacks.dylora import Rank, RankDraw
from deltatune.core import Adapter, Callback, DeltatuneError, Method, Site, Union, attach
from deltatune.methods.lora import LoRA, LowRank


@dataclass(frozen=True, kw_only=True)
class DyLoRA(Method):
    """`seed`: of the draws, which depend on it and the step alone."""

    lr: ClassVar[float] = 2e-3
    r: int = 8
    r_min: int = 1
    alpha: float = 16.0
    update: Literal["frozen", "full"] = "frozen"
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update not in ("frozen", "full"):
            raise DeltatuneError(f"DyLoRA: update is 'frozen' or 'full', got {self.update!r}")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"DyLoRA: dropout must lie in [0, 1), got {self.dropout}")
        self._draw()

    def shared(self, sites: Sequence[Site]) -> Rank:
        return Rank()

    def build(self, site: Site, shared: nn.Module | None) -> Nested:
        assert isinstance(shared, Rank)
        return Nested(site, self, shared)

    def callbacks(self) -> Iterable[Callback]:
        return [self._draw()]

    def _draw(self) -> RankDraw:
        return RankDraw(r=self.r, r_min=self.r_min, seed=self.seed)

    @staticmethod
    def truncate(adapter: Adapter, r: int, name: str) -> Adapter:
        """Attach the first `r` ranks of a trained DyLoRA as a `LoRA` called `name`, and activate it."""
        if (method := _truncated(adapter.method, r)) == adapter.method:
            raise DeltatuneError(f"DyLoRA: adapter {adapter.name!r} is a {type(method).__name__}, without nested ranks")
        cut = attach(adapter.model, method, name, dtype=adapter.dtype)
        shapes = {n: t.shape for n, t in cut.state_dict().items()}
        cut.load_state_dict({n: t[tuple(map(slice, shapes.get(n, t.shape)))] for n, t in adapter.state_dict().items()})
        return cut


def _truncated(method: Method, r: int) -> Method:
    if isinstance(method, Union):
        return replace(method, methods=tuple(_truncated(part, r) for part in method.methods))
    if not isinstance(method, DyLoRA):
        return method
    if not 1 <= r <= method.r:
        raise DeltatuneError(f"DyLoRA: the adapter has ranks 1 to {method.r}; it cannot be cut to {r}")
    return LoRA(r=r, alpha=method.alpha, dropout=method.dropout, targets=method.targets)


class Nested(LowRank):
    def __init__(self, site: Site, method: DyLoRA, rank: Rank) -> None:
        super().__init__(site, method.r, method.alpha / method.r, method.dropout)
        self.alpha, self.frozen, self.rank = method.alpha, method.update == "frozen", rank

    def scaled_factors(self) -> tuple[Tensor, Tensor, float]:
        if self.rank.b is None or not self.training:
            return super().scaled_factors()
        up, down = self.b[:, : self.rank.b], self.a[: self.rank.b]
        if self.frozen:
            up = torch.cat([up[:, :-1].detach(), up[:, -1:]], 1)
            down = torch.cat([down[:-1].detach(), down[-1:]])
        return up, down, self.alpha / self.rank.b
