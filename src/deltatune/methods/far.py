"""FAR, freeze and reconfigure: Efficient Fine-Tuning of BERT Models on the Edge. Vucetic et al., ISCAS 2022.
arXiv:2205.01541

    y_j = (w_j + d_j) x + b_j + c_j     for the nodes j (rows of W) in the learner set L of a feed-forward layer
    y_j = w_j x + b_j                   for the frozen ones

Priming first trains all nodes for a few steps; L is the round(retention out) nodes of each layer that moved most,
||w_j - w_j^0||_1. Then only d (|L|, in) and c (|L|,) train, so neither gradients nor optimizer states of frozen nodes
exist. The paper stores both sets apart; here the base stays whole and the learners' outputs are added to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.callbacks.selection import Selection, TwoPhases, Units, settle
from deltatune.core import Base, Callback, Delta, DeltatuneError, Method, Run, Site
from deltatune.methods.coordinates import check_share, resize


@dataclass(frozen=True, kw_only=True)
class FAR(Method):
    """`retention`: the share of learner nodes; `priming`: its share of the steps; `start`: where learners go on from,
    rewound to the base or as primed. Frozen nodes are always the base's."""

    lr: ClassVar[float] = 1e-3
    retention: float = 0.1
    priming: float = 0.01
    start: Literal["base", "primed"] = "base"

    usual = ("gate", "up", "down")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "retention", "priming")
        if self.start not in ("base", "primed"):
            raise DeltatuneError(f"FAR: start is 'base' or 'primed', got {self.start!r}")

    def build(self, site: Site, shared: nn.Module | None) -> Nodes:
        r = round(self.retention * site.shape.out)
        if not r:
            raise DeltatuneError(
                f"FAR: retention={self.retention} of the {site.shape.out} nodes of {site.path} is none"
            )
        return Nodes(site, r, self)

    def callbacks(self) -> Iterable[Callback]:
        return [Selection(method=self)]

    def begin(self, run: Run, units: Units) -> TwoPhases:
        return _Priming(self, self.priming, run, units)


class Nodes(Delta):
    """`indices` (r,): the learners; `values` = d (r, in) and, where the layer has a bias, `shift` = c (r,)."""

    indices: Tensor
    chosen: Tensor
    grows = ("indices", "values", "shift")

    def __init__(self, site: Site, r: int, method: Method) -> None:
        super().__init__()
        self.size, self.method = site.shape.out, method
        self.values = nn.Parameter(torch.zeros(r, site.shape.in_, **site.like))
        bias = isinstance(getattr(site.module, "bias", None), Tensor)
        self.shift = nn.Parameter(torch.zeros(r, **site.like)) if bias else None
        self.register_buffer("indices", torch.arange(r, device=site.device) * self.size // r)
        self.register_buffer("chosen", torch.tensor(False, device=site.device))

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        r, in_ = shapes["indices"].numel(), self.values.shape[1]
        if shapes != {"indices": (r,), "values": (r, in_)} | ({} if self.shift is None else {"shift": (r,)}):
            raise DeltatuneError(f"FAR: each learner needs a row of {in_}, got {shapes}")
        self.move_to(self.indices.new_zeros(r))

    @torch.no_grad()
    def move_to(self, indices: Tensor) -> None:
        self.indices = indices.to(self.indices)
        resize(self.values, len(indices), self.values.shape[1])
        if self.shift is not None:
            resize(self.shift, len(indices))

    def weight(self, w: Tensor) -> Tensor:
        return _add(w, self.indices, self.values)

    def bias(self, b: Tensor) -> Tensor:
        return b if self.shift is None else _add(b, self.indices, self.shift)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not call.is_linear:
            return super().forward(call, x, *args, **kwargs)
        y = call(x)
        return y.index_add(-1, self.indices, F.linear(x.to(self.values.dtype), self.values, self.shift).to(y.dtype))


def _add(t: Tensor, rows: Tensor, more: Tensor) -> Tensor:
    wide = torch.promote_types(t.dtype, more.dtype)
    return t.to(wide).index_add(0, rows, more.to(wide))


class _Priming(TwoPhases):
    def choose(self) -> None:
        for u in self.units:
            moved = u.values.abs().sum(1)
            learners = moved.topk(round(self.method.retention * u.size)).indices.sort().values
            primed = [(p, p[learners]) for p in (u.values, u.shift) if p is not None]
            settle([u], [learners])
            for p, was in primed if self.method.start == "primed" else ():
                p.copy_(was)
