"""S4: Parameter-Efficient Fine-Tuning Design Spaces. Chen et al., ICLR 2023. arXiv:2301.01821

    blocks        four groups G1..G4 of consecutive ones, a spindle: N1 < N2 ~ N3 > N4
    parameters    as many in every block, and every group is trained
    strategies    G1: adapter, LoRA   G2: adapter, prefix   G3: adapter, prefix, BitFit   G4: prefix, BitFit, LoRA

The sizes are this library's: floor(L / 6) blocks in G1 and in G4, the rest in halves, so that fewer than six blocks
have no outer groups; what BitFit leaves of a block's budget is shared evenly by Pfeiffer's adapter, the keys and values
of a prefix, and LoRA at q and v; what rounding leaves goes to the finest, so that a block is off by half a step of it
at most. An encoder and a decoder are grouped each by itself. Where a model has no bias vectors (Llama, T5), give
`strategies` without "bitfit". A head is one more method in a `Union`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from deltatune.core import DeltatuneError, Method, Part, Select, Site, resolve
from deltatune.methods.bitfit import BitFit
from deltatune.methods.budget import Solution, Within, block_of, solve
from deltatune.methods.lora import LoRA
from deltatune.methods.pfeiffer import Pfeiffer
from deltatune.methods.prefix import PrefixTuning
from deltatune.models.prefixing import Positions

SIZED: Mapping[str, Callable[[int], Method]] = {
    "adapter": lambda n: Pfeiffer(size=n),
    "lora": lambda n: LoRA(r=n, alpha=2.0 * n, targets=Part("q", "v")),  # the same alpha / r everywhere
    "prefix": lambda n: PrefixTuning(length=n, targets=Part("attention")),
}


@dataclass(frozen=True, kw_only=True)
class S4(Method):
    """`budget`: parameters trained in each block or, below 1, the share of the base's that are trained in all.
    `strategies`: the components of each group. `groups`: the number of blocks in each, None for a spindle."""

    lr: ClassVar[float] = 5e-3
    budget: float = 0.005
    strategies: tuple[tuple[str, ...], ...] = (
        ("adapter", "lora"),
        ("adapter", "prefix"),
        ("adapter", "prefix", "bitfit"),
        ("prefix", "bitfit", "lora"),
    )
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strategies", tuple(map(tuple, self.strategies)))
        if self.targets is not None:
            raise DeltatuneError(f"S4: targets={self.targets!r}: `strategies` say what is trained; leave targets out")
        if self.budget <= 0 or (self.groups is not None and (len(self.groups) != 4 or min(self.groups) < 0)):
            raise DeltatuneError(
                f"S4: budget={self.budget} must be positive and groups={self.groups} None or four numbers"
            )
        wrong = [s for s in self.strategies if not set(s) & {*SIZED} or set(s) - {*SIZED, "bitfit"}]
        if wrong or len(self.strategies) != 4:
            kinds = ", ".join(SIZED)
            raise DeltatuneError(f"S4: strategies={self.strategies} are not four, each of {kinds}, bitfit beside them")

    def parts(self) -> Sequence[Method]:
        kinds, solution = [k for k in (*SIZED, "bitfit") if any(k in s for s in self.strategies)], Solution()
        own = [_Component(s4=self, kind=k, solution=solution) for k in kinds]
        return [*own, Positions()] if "prefix" in kinds else own

    def sizes(self, blocks: int) -> tuple[int, ...]:
        """N1 to N4 of a stack of so many blocks."""
        outer, inner = blocks // 6, blocks - 2 * (blocks // 6)
        sizes = self.groups or (outer, inner - inner // 2, inner // 2, outer)
        if sum(sizes) != blocks:
            raise DeltatuneError(f"S4: groups={sizes} are {sum(sizes)} blocks, and the model has {blocks}")
        return sizes

    def strategy(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """The components of each block."""
        stacks, strategy = dict[str, list[str]](), dict[str, tuple[str, ...]]()
        for m in resolve(model, Part("block")):
            stacks.setdefault(m.path.rpartition(".")[0], []).append(m.path)
        for blocks in stacks.values():
            groups = [s for s, n in zip(self.strategies, self.sizes(len(blocks)), strict=True) for _ in range(n)]
            strategy |= zip(blocks, groups, strict=True)
        return strategy


@dataclass(frozen=True, kw_only=True)
class _Component(Method):
    s4: S4
    kind: str
    solution: Solution = field(compare=False)

    @property
    def at(self) -> tuple[str, ...]:  # type: ignore[override]
        return SIZED[self.kind](1).at if self.kind in SIZED else BitFit.at

    def select(self, model: nn.Module) -> Select:
        if not self.solution:
            self.solution.update(solve(model, self.s4.strategy(model), self.s4.budget, SIZED))
        mine = {block: m for (block, kind), m in self.solution.items() if kind == self.kind}
        return Within(targets=next(iter(mine.values())).select(model), blocks=tuple(mine)) if mine else ()

    def build(self, site: Site, shared: nn.Module | None) -> Any:
        block = block_of(site.path, {b for b, _ in self.solution})
        return self.solution[block, self.kind].build(site, None)
