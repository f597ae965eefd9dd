"""Top-k routing: Outrageously Large Neural Networks, Shazeer et al., ICLR 2017, arXiv:1701.06538, with the gates
renormalised over the chosen, as Mixtral does (arXiv:2401.04088).

    y = sum_{i in top k} g_i f_i(x),    g = softmax over the k largest of z = W_g x
    L_b = E sum_i f_i P_i               balance: 1 when even, E when all goes to one   (Switch, arXiv:2101.03961, eq. 4)
    L_z = mean (logsumexp z)^2          keeps the logits small                        (ST-MoE, arXiv:2202.08906, eq. 5)

f_i is the share of the assignments that expert i gets, P_i the mean of its softmax over all experts. A router sees no
padding mask, so padding counts as tokens; packed batches have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Router, Run
from deltatune.kernels.device import kind


class TopK(Router):
    """`gate` (n, dim). After a training forward, `logits` (tokens, n) are those of that forward, for `Balance`."""

    roles = {"gate": "gate"}
    logits: Tensor | None

    def __init__(self, dim: int, n: int, k: int, **like: Any) -> None:
        super().__init__()
        if not 1 <= k <= n:
            raise DeltatuneError(f"TopK: k must lie between 1 and the {n} experts, got {k}")
        self.k, self.logits = k, None
        self.gate = nn.Parameter(torch.empty(n, dim, **like).normal_(std=0.02))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"logits": None}

    def gates(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., n), in fp32 or wider: k positive numbers that sum to one, and zeros."""
        wide = torch.promote_types(self.gate.dtype, torch.float32)
        with torch.autocast(kind(x), enabled=False):  # bf16 logits would tie
            z = F.linear(x.to(wide), self.gate.to(wide))
        if self.training and torch.is_grad_enabled():
            self.logits = z.flatten(0, -2)
        return _chosen(z, self.k).softmax(-1)

    def forward(self, x: Tensor, branches: Sequence[Callable[[], Tensor]]) -> Tensor:
        g = self.gates(x)
        first, *rest = (f() for f in branches)
        y = g[..., 0, None] * first
        for i, branch in enumerate(rest, 1):
            y = y + g[..., i, None] * branch
        return y.to(first.dtype)


def _chosen(z: Tensor, k: int) -> Tensor:
    """z with all but its k largest at -inf."""
    top = z.topk(k, -1)
    return torch.full_like(z, -torch.inf).scatter(-1, top.indices, top.values)


def balance_loss(z: Tensor, k: int) -> Tensor:
    """L_b of logits (tokens, E), by softmax over all experts; no gradient through the shares."""
    share = _chosen(z.detach(), k).isfinite().to(z.dtype).mean(0) / k
    return z.shape[-1] * (share * z.softmax(-1).mean(0)).sum()


def z_loss(z: Tensor) -> Tensor:
    return z.logsumexp(-1).square().mean()


@dataclass(frozen=True, kw_only=True)
class Balance(Callback):
    """Adds `balance` L_b + `z` L_z, averaged over the routers of the adapter, to the loss of a step."""

    balance: float = 0.01
    z: float = 0.0

    def start(self, run: Run) -> _Balancing:
        return _Balancing(self, run)


class _Balancing(Events):
    def __init__(self, options: Balance, run: Run) -> None:
        self.options, self.run = options, run

    def _routers(self) -> Iterator[TopK]:
        assert self.run.adapter is not None  # a router is part of an adapter
        return (m for _, unit in self.run.adapter.units() for m in unit.modules() if isinstance(m, TopK))

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        terms = []
        for router in self._routers():
            if router.logits is not None:
                z, router.logits = router.logits, None
                terms.append(self.options.balance * balance_loss(z, router.k) + self.options.z * z_loss(z))
        return loss + run.share * torch.stack([t.to(loss.device) for t in terms]).mean() if terms else loss
