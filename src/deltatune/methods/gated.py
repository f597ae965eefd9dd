"""The units of UniPELT, each with its gate: see `methods.unipelt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, Intervention, Site
from deltatune.methods.lora import LowRank
from deltatune.methods.pfeiffer import AtBlock, AtNorm, Bottleneck
from deltatune.models.anatomy import layers
from deltatune.models.calls import arguments
from deltatune.models.prefixing import Prefix, group, prepend, width
from deltatune.models.visible import Gate, Visible


class Reading(Intervention):
    """At an attention module: G_P of its input, for the attention function inside."""

    def __init__(self, site: Site, visible: Visible) -> None:
        super().__init__()
        self.gate, self.depth = Gate(visible, width(site), **site.like), layers(site.config, "decoder")
        self.crosses = group(site) == "cross"

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        return self.batched([self], None, call, *args, **kwargs)

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor | None, call: Any, *args: Any, **kwargs: Any) -> Any:
        x = next(iter(arguments(call.module, args, kwargs).values()))
        for i, unit in enumerate(units):
            own = None if rows is None else (rows == i).nonzero().flatten()
            if not unit.crosses:
                unit.gate.visible.enter(call, args, kwargs, unit.depth, own)
            unit.gate.visible.now().gate = unit.gate(x if own is None else x.index_select(0, own))
        y = call(*args, **kwargs)
        for unit in units:
            unit.gate.visible.now().gate = None
        return y


class GatedPrefix(Prefix):
    """G_P (b, n, 1) weighs keys by the query: heads of twice the width, [q; G q], see [k; 0] and [0; P_k]."""

    only_prepends = False

    def __init__(self, source: nn.Module, dropout: float, visible: Visible) -> None:
        super().__init__(source, dropout)
        self.visible = visible

    def forward(self, call: Base, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        d, g = query.shape[-1], self.visible.now().gate[:, None].to(query.dtype)  # type: ignore[index]
        if kwargs.get("scaling") is None:
            kwargs["scaling"] = d**-0.5
        query, key, value = torch.cat([query, g * query], -1), F.pad(key, (0, d)), F.pad(value, (0, d))
        k, v = (F.pad(self.dropout(t.expand(len(query), -1, -1, -1)), (d, 0)) for t in self.source())
        y, weights = prepend(call, k, v, None, query, key, value, mask, **kwargs)
        return y[..., :d] + g.transpose(1, 2) * y[..., d:], weights

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented


class GatedLoRA(Intervention):
    """A product and a gate for each of the queries and values that a module makes, whose rows they are."""

    def __init__(self, pieces: Sequence[tuple[Tensor | None, LowRank, Gate]]) -> None:
        super().__init__()
        for i, (rows, _, _) in enumerate(pieces):
            self.register_buffer(f"rows{i}", rows, persistent=False)
        self.deltas, self.gates = nn.ModuleList(d for _, d, _ in pieces), nn.ModuleList(g for *_, g in pieces)

    def forward(self, call: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = call(x, *args, **kwargs)
        for i, (delta, gate) in enumerate(zip(self.deltas, self.gates, strict=True)):
            up, down = delta.product()  # type: ignore[operator]
            more = (gate(x) * F.linear(F.linear(x.to(down.dtype), down), up)).to(y.dtype)
            rows = getattr(self, f"rows{i}")
            y = y + more if rows is None else y.index_add(-1, rows, more)
        return y


class Gated(Bottleneck):
    """The last of its block to ask what is seen there."""

    def __init__(self, site: Site, d: int, m: int, gate: Gate) -> None:
        super().__init__(site, d, m)
        self.gate = gate

    def core(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        self.gate.visible.leave()
        return g.to(x.dtype) * super().core(x)


class GatedAtNorm(Gated, AtNorm): ...


class GatedAtBlock(Gated, AtBlock): ...
