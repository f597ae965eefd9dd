"""Components of blocks in such sizes that every block trains as many parameters: see `methods.s4`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deltatune.core import DeltatuneError, Layers, Method, plan, resolve
from deltatune.core.select import Match
from deltatune.methods.bitfit import BitFit

Solution = dict[tuple[str, str], Method]  # (block, component) -> the component in its size


@dataclass(frozen=True, kw_only=True)
class Within(Layers):
    """Modules of `targets` that are, or lie in, blocks of these paths."""

    blocks: tuple[str, ...]

    def among(self, found: list[Match]) -> list[Match]:
        return [m for m in found if block_of(m.path, self.blocks)]


def block_of(path: str, blocks: Container[str]) -> str:
    """The block that a module is or lies in, "" for none."""
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path


def solve(model: nn.Module, strategy: Mapping[str, tuple[str, ...]], budget: float,
          sized: Mapping[str, Callable[[int], Method]]) -> Solution:  # fmt: skip
    """`strategy`: block -> its components, "bitfit" or of `sized`, methods of a size that parameters grow evenly with.
    `budget`: the parameters of a block, or, below 1, the share of the model's that all blocks have."""
    used = [k for k in sized if any(k in names for names in strategy.values())]
    plans = {k: (plan(model, sized[k](1)), plan(model, sized[k](2))) for k in used}
    one, two = (
        {k: _counts(((s.path, s.parameters) for s in plans[k][i].sites), strategy) for k in used} for i in (0, 1)
    )
    held = ((m.path, getattr(m.module, "bias", None)) for m in resolve(model, "all-layers"))
    biases = _counts(((path, b.numel()) for path, b in held if isinstance(b, Tensor)), strategy)
    each = budget if budget >= 1 else budget * plans[used[0]][0].total / len(strategy)
    solution = Solution()
    for block, names in strategy.items():
        left = each
        if "bitfit" in names:
            if not biases[block]:
                raise DeltatuneError(f"{block} has no bias vectors for BitFit; give `strategies` without 'bitfit'")
            solution[block, "bitfit"], left = BitFit(), left - biases[block]
        steps = {k: two[k][block] - one[k][block] for k in used if k in names}
        left -= sum(one[k][block] - step for k, step in steps.items())  # what no size changes: an adapter's own biases
        for i, (k, step) in enumerate(sorted(steps.items(), key=lambda item: -item[1])):
            size = max(1, round(left / (len(steps) - i) / step))
            left -= size * step
            solution[block, k] = sized[k](size)
        if abs(left) > step / 2:
            raise DeltatuneError(
                f"{block}: a budget of {each:.0f} parameters is {-left:.0f} too few for one of each component; raise it"
            )
    return solution


def _counts(sites: Iterable[tuple[str, int]], blocks: Iterable[str]) -> dict[str, int]:
    numbers = dict.fromkeys(blocks, 0)
    for path, n in sites:
        if block := block_of(path, numbers):
            numbers[block] += n
    return numbers
