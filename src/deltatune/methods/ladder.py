"""LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning. Sung, Cho and Bansal, NeurIPS 2022.
arXiv:2206.06522

    g_0 = D_0 h_0,    g_i = S_i(mu_i g_{i-1} + (1 - mu_i) D_i h_i),    mu_i = sigmoid(alpha_i / T)
    the head, frozen, reads Up norm(g_L)

h_0 are the embedded tokens and h_i the output of block i of the backbone, (b, s, d); S_i is a narrow block, of width
d / R, D_i: d -> d / R and Up: d / R -> d. The backbone runs without gradients, so that of its activations the h_i alone
are kept, and adapters inside it act but do not train. An encoder and a decoder have a ladder each; the narrow decoder
looks at the narrow encoder's states, which come to it behind those of the backbone: the output of an encoder that a
decoder reads is [h_L | norm(g_L)], (b, s, d + d / R).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Init, Method, Site
from deltatune.inits.pruned import PrunedByMagnitude
from deltatune.models.side import Beside, Side, Tap, Tape, number, output_width, read_by_decoder


@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(Method):
    """`reduction` R; `kept`: numbers of the blocks that have a rung, in each stack, None for all; `temperature` T."""

    lr: ClassVar[float] = 5e-3
    reduction: int = 8
    kept: tuple[int, ...] | None = None
    temperature: float = 0.1
    init: Init = field(default_factory=PrunedByMagnitude)

    usual = ("backbone", "decoder")
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        name, kept = type(self).__name__, self.kept
        if self.reduction < 1 or self.temperature <= 0:
            now = f"reduction={self.reduction}, temperature={self.temperature}"
            raise DeltatuneError(f"{name}: {now}: reduction is at least 1, temperature positive")
        if kept is not None and (not kept or kept[0] < 0 or sorted(set(kept)) != list(kept)):
            raise DeltatuneError(f"{name}: kept={kept}: give numbers of blocks from 0 on, ascending, or None for all")

    def parts(self) -> Sequence[Method]:
        return self, _Taps()

    def callbacks(self) -> Iterable[Callback]:
        return self.init.callbacks()

    def build(self, site: Site, shared: nn.Module | None) -> Ladder:
        return self._start(Ladder(Side(site, self.reduction, self.kept), self.temperature, site), site)

    def _start(self, unit: Ladder, site: Site) -> Ladder:
        self.init.start(unit, site)
        return unit


@dataclass(frozen=True, kw_only=True)
class ResidualLadder(LadderSideTuning):
    """The head reads h + Up norm(g_L), h being what the backbone gives it; Up = 0 at first, which is the base."""

    def build(self, site: Site, shared: nn.Module | None) -> Ladder:
        return self._start(AddedLadder(Side(site, self.reduction, self.kept), self.temperature, site), site)


@dataclass(frozen=True, kw_only=True)
class _Taps(Method):
    usual = ("block",)
    at = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> Tap:
        return Tap(number(site.path))


class Ladder(Beside):
    roles: ClassVar[Mapping[str, str]] = {"alpha": "gate"}

    def __init__(self, side: Side, temperature: float, site: Site) -> None:
        super().__init__(side)
        rungs, d, n = len(side.kept), side.wide, side.narrow
        self.temperature = temperature
        self.alpha = nn.Parameter(torch.zeros(rungs, **site.like))
        self.down = nn.ModuleList(nn.Linear(d, n, **site.like) for _ in range(rungs + 1))
        self.up = None if read_by_decoder(site) else nn.Linear(n, output_width(site), **site.like)

    def climb(self, tape: Tape, memory: Tensor | None) -> Tensor:
        mu, run = torch.sigmoid(self.alpha / self.temperature), self.side.runner(tape, memory)
        g = self.down[0](tape[0].entered.to(mu.dtype))
        for i, block in enumerate(self.side.kept):
            g = run(i, mu[i] * g + (1 - mu[i]) * self.down[i + 1](tape[block].out.to(mu.dtype)))
        return self.side.norm(g.to(mu.dtype))  # type: ignore[no-any-return]

    def states(self, h: Tensor, g: Tensor) -> Tensor | None:
        return None if self.up is None else self.up(g)


class AddedLadder(Ladder):
    def __init__(self, side: Side, temperature: float, site: Site) -> None:
        super().__init__(side, temperature, site)
        for p in () if self.up is None else self.up.parameters():
            nn.init.zeros_(p)

    def states(self, h: Tensor, g: Tensor) -> Tensor | None:
        return None if self.up is None else h + self.up(g)
