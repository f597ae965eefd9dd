"""Copies of an adapter's projections, of which training draws some and evaluation takes the mean: what AdaMix mixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Delta, Intervention
from deltatune.methods.lora import LowRank


class Copies(Intervention):
    """`down`, `up` and their biases; a side that is not `sharing` has a first dimension of n, equal at first."""

    roles = {"down": "down", "up": "up"}
    names: ClassVar[Mapping[str, str]]  # of the parameters, as one such unit calls them

    def __init__(self, unit: Intervention, n: int, sharing: str) -> None:
        super().__init__()
        self.n, self.sharing = n, sharing
        for name, own in self.names.items():
            p = getattr(unit, own).detach()
            self.register_parameter(name, nn.Parameter(p.clone() if self.shares(name) else p.repeat(n, *[1] * p.ndim)))

    def shares(self, name: str) -> bool:
        return name.startswith(self.sharing)

    def mean(self) -> dict[str, Tensor]:
        return {name: p if self.shares(name) else p.mean(0) for name, p in self.named_parameters()}

    def current(self) -> dict[str, Tensor]:
        """What this call uses: in training a copy of each side, a projection and its bias, drawn uniformly."""
        if not self.training:
            return self.mean()
        found: dict[str, Tensor] = {}
        drawn: dict[str, Tensor] = {}
        for name, p in self.named_parameters():
            side = name.partition("_")[0]
            if not self.shares(name) and side not in drawn:
                drawn[side] = torch.randint(self.n, (1,), device=p.device)
            found[name] = p.index_select(0, drawn[side])[0] if side in drawn else p
        return found


class Bottlenecks(Copies):
    """Of Houlsby's, on the output of a module."""

    names = {n: n for n in ("down", "down_bias", "up", "up_bias")}

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Tensor:
        u, now = call(*args, **kwargs), self.current()
        h = F.linear(u.to(now["down"].dtype), now["down"], now["down_bias"])
        return u + F.linear(F.gelu(h, approximate="tanh"), now["up"], now["up_bias"]).to(u.dtype)


class LowRanks(Copies, Delta):
    """Of LoRA's `a` and `b`; merging takes the means."""

    names = {"down": "a", "up": "b"}

    def __init__(self, unit: LowRank, n: int, sharing: str) -> None:
        super().__init__(unit, n, sharing)
        self.s, self.dropout = unit.s, unit.dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        mean = self.mean()
        return self.s * mean["up"], mean["down"]

    def weight(self, w: Tensor) -> Tensor:
        up, down = self.factors()
        return w + up @ down

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        now, p = self.current(), self.dropout.p if self.training else 0.0
        y = call.plus(x, now["up"], now["down"], scale=self.s, dropout=p)
        return call.op(call.weight + self.s * now["up"] @ now["down"], x, *args, **kwargs) if y is None else y
