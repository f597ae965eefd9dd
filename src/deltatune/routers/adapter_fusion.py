"""The attention of AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., EACL 2021.
arXiv:2005.00247

    s_n = (W_q x + b_q) . (W_k z_n + b_k)         W_q, W_k, W_v in R^{d x d}                        (sec. 3.2)
    o = sum_n a_n W_v z_n,   a = softmax over the N adapters of s
    L_r = sum over the sites of |I - W_v|_F^2     keeps the values near what the adapters say

There is no 1 / sqrt(d); dropout is on the scores s. W_q and W_k are normal with deviation 0.02, their biases zero, W_v
is the identity with 1e-6 beside its diagonal. All the adapters of a token share its query, so that

    s_n = (W_k^T q) . z_n + q . b_k,    o = W_v sum_n a_n z_n

cost three products of d x d a token, whatever N. Without dropout b_k adds the same to all scores, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Groups, Router, Run


class FusionAttention(Router):
    """`query`, `key`, `value` (d, d) and the biases of the first two. `seen`, if a list, receives a (..., N)."""

    roles = {"query": "query", "key": "key", "value": "value"}

    def __init__(self, d: int, dropout: float = 0.0, **like: Any) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.empty(d, d, **like).normal_(std=0.02)) for _ in "qk")
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(d, **like)) for _ in "qk")
        self.value = nn.Parameter(torch.full((d, d), 1e-6, **like).fill_diagonal_(1.0))
        self.dropout = nn.Dropout(dropout)
        self.seen: list[Tensor] | None = None

    def weights(self, x: Tensor, z: Tensor) -> Tensor:
        """x (..., d), z (..., N, d) -> a (..., N), in fp32 or wider."""
        q = F.linear(x, self.query, self.query_bias)
        s = (z @ (q @ self.key)[..., None])[..., 0] + (q @ self.key_bias)[..., None]
        return self.dropout(s.to(torch.promote_types(s.dtype, torch.float32))).softmax(-1)

    def forward(self, x: Tensor, branches: Sequence[Callable[[], Tensor]]) -> Tensor:
        z = torch.stack([branch() for branch in branches], -2).to(self.query.dtype)
        a = self.weights(x.to(z.dtype), z)
        if self.seen is not None:
            self.seen.append(a.detach())
        return F.linear((a.to(z.dtype)[..., None, :] @ z)[..., 0, :], self.value)


@dataclass(frozen=True, kw_only=True)
class FusionRegularisation(Callback):
    """Adds `weight` L_r to the loss of a step, and takes weight decay off W_v."""

    weight: float = 0.01

    def start(self, run: Run) -> _Regularised:
        units = () if run.adapter is None else run.adapter.units()
        values = [m.value for _, unit in units for m in unit.modules() if isinstance(m, FusionAttention)]
        if not values:
            raise DeltatuneError("FusionRegularisation: nothing in training fuses adapters; use it with AdapterFusion")
        return _Regularised(self.weight, values)


class _Regularised(Events):
    def __init__(self, weight: float, values: Sequence[Tensor]) -> None:
        self.weight, self.values = weight, values

    def param_groups(self, groups: Groups) -> Groups:
        mine, split = {id(v) for v in self.values}, []
        for group in groups:
            values = [p for p in group["params"] if id(p) in mine]
            split.append(group | {"params": [p for p in group["params"] if id(p) not in mine]})
            split += [group | {"params": values, "weight_decay": 0.0}] if values else []
        return [group for group in split if group["params"]]

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        far = [(v - torch.eye(len(v), dtype=v.dtype, device=v.device)).square().sum() for v in self.values]
        return loss + self.weight * run.share * torch.stack([t.to(loss.device) for t in far]).sum()
