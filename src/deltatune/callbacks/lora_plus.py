"""LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al., ICML 2024. arXiv:2402.12354

    lr of B = ratio * lr of A

Every parameter in the role "up" learns faster; the others (down, scales, gates, norms, heads) keep their rate. The
authors use 16 to 80 on small models and find the best ratio near 1 on an easy task with a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltatune.core import Callback, DeltatuneError, Events, Groups, Run


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(Callback):
    ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 0:
            raise DeltatuneError(f"LoRAPlus: ratio must be positive, got {self.ratio}")

    def start(self, run: Run) -> _Groups:
        up = set() if run.adapter is None else {id(p) for role, p in run.adapter.roles() if role == "up"}
        if not up:
            raise DeltatuneError('LoRAPlus: nothing in training has the role "up"; use it with a low-rank method')
        return _Groups(self.ratio, up)


class _Groups(Events):
    def __init__(self, ratio: float, up: set[int]) -> None:
        self.ratio, self.up = ratio, up

    def param_groups(self, groups: Groups) -> Groups:
        """Each group in two, the slower first; all its other options are kept."""
        split: Groups = []
        for group in groups:
            slow = [p for p in group["params"] if id(p) not in self.up]
            fast = [p for p in group["params"] if id(p) in self.up]
            split += [group | {"params": slow}] if slow else []
            split += [group | {"params": fast, "lr": group["lr"] * self.ratio}] if fast else []
        return split
