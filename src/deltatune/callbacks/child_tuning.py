"""Child-Tuning-F: Raise a Child in Large Language Model. Xu et al., EMNLP 2021. arXiv:2109.05687

    g <- g * M / p_F,     M ~ Bernoulli(p_F) anew for every parameter in every step

before the optimizer's moments and before clipping, so the expected gradient is unchanged: noise for what trains. The
authors train the whole base; with an adapter it acts on the adapter. Step t's masks depend on `seed` and t alone, so
processes agree, and a resumed run goes on with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltatune.core import Callback, DeltatuneError, Events, Run


@dataclass(frozen=True, kw_only=True)
class ChildTuningF(Callback):
    """`p`: p_F, the share of the gradient that is kept in a step."""

    p: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise DeltatuneError(f"ChildTuningF: p must lie in (0, 1], got {self.p}")

    def start(self, run: Run) -> _Masks:
        return _Masks(self)


class _Masks(Events):
    def __init__(self, options: ChildTuningF) -> None:
        self.options = options

    def on_grads(self, run: Run) -> None:
        o, generators = self.options, {}
        for p in (run.model if run.adapter is None else run.adapter).parameters():
            if p.grad is None or o.p == 1:
                continue
            if p.device not in generators:
                generators[p.device] = torch.Generator(p.device).manual_seed(o.seed * 1_000_003 + run.step)
            kept = torch.empty(p.shape, device=p.device).bernoulli_(o.p, generator=generators[p.device])
            p.grad.mul_(kept.to(p.grad.dtype)).div_(o.p)
