"""LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation. Zhou et al., COLING 2025. arXiv:2402.07721

    W' = W + s B A,    B in R^{out x r},  A in R^{r x in},  s = alpha / r

Sites of one kind, the queries of all blocks for example, are compared by what they put out after a short trial, and
the least important then share one pair (A, B): see `callbacks.lora_drop`. A is Kaiming-uniform and B zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.callbacks.lora_drop import OutputEvaluation
from deltatune.core import Callback, DeltatuneError, Method, Site
from deltatune.inits.seeded import place
from deltatune.methods.lora import LowRank


@dataclass(frozen=True, kw_only=True)
class LoRADrop(Method):
    """`kept`: the sites that have a pair of their own. It is None until training has chosen them, which takes `trial`
    batches and keeps a share `threshold` of the output; a site is then as in LoRA."""

    lr: ClassVar[float] = 2e-3
    r: int = 8
    alpha: float = 16.0
    threshold: float = 0.9
    trial: int = 64
    trial_lr: float = 1e-3
    dropout: float = 0.0
    seed: int = 0
    kept: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise DeltatuneError(f"LoRADrop: r must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"LoRADrop: dropout must lie in [0, 1), got {self.dropout}")
        self._evaluation()

    def _evaluation(self) -> OutputEvaluation:
        return OutputEvaluation(threshold=self.threshold, batches=self.trial, lr=self.trial_lr, seed=self.seed)

    def shares(self, site: Site) -> bool:
        return self.kept is not None and place(site) not in self.kept

    def shared(self, sites: Sequence[Site]) -> Pairs:
        pairs = Pairs()
        for site in sites:
            if self.shares(site):
                pairs.tie(Pair(site, self))
        return pairs

    def build(self, site: Site, shared: nn.Module | None) -> Pair:
        pair = Pair(site, self)
        if self.shares(site):
            assert isinstance(shared, Pairs)
            shared.tie(pair)
        return pair

    def callbacks(self) -> Iterable[Callback]:
        return [self._evaluation()]


class Pair(LowRank):
    """`kind`: the site's path without its block's number, and its size; sites of one kind can share."""

    def __init__(self, site: Site, method: LoRADrop) -> None:
        super().__init__(site, method.r, method.alpha / method.r, method.dropout)
        self.owner, self.place = method, place(site)
        name = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", self.place, count=1).replace(".", "/")
        self.kind = f"{name} {site.shape.out}x{site.shape.in_}"


class Pairs(nn.ModuleDict):
    """The shared pairs, by kind."""

    def tie(self, pair: Pair) -> None:
        """`pair` becomes the shared one of its kind, which it is itself if there is none."""
        if pair.kind not in self:
            self[pair.kind] = nn.ParameterDict({"a": pair.a, "b": pair.b})
        shared = self.get_submodule(pair.kind)
        pair.a, pair.b = shared.get_parameter("a"), shared.get_parameter("b")
