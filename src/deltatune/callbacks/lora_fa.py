"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning. Zhang et al., 2023.
arXiv:2308.03303

    W' = W + s B A,   A at random and frozen, B trained
    g_B' = 1/s^2  g_B (A A^T)^-1        g_B = dL/dB = s G A^T,  G = dL/dW'

With A frozen the backward pass of B needs h = A x, r numbers a token, and no longer x, `in` numbers. Of all steps of B,
g_B' moves W' nearest to the full gradient: s g_B' A is the projection of G onto the row space of A, the minimum of
|| s g A - G ||_F over g. A A^T + 1e-8 is inverted in fp32 or wider, once, for A does not change. The projected gradient
is what is clipped and given to the optimizer. `gradient="plain"` is the paper's first version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Run, Staged

EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class LoRAFA(Callback):
    gradient: Literal["projected", "plain"] = "projected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient not in ("projected", "plain"):
            raise DeltatuneError(f"LoRAFA: gradient is 'projected' or 'plain', got {self.gradient!r}")

    def start(self, run: Run) -> _Frozen:
        units = () if run.adapter is None else (m for _, u in run.adapter.units() for m in u.modules())
        pairs = [m for m in units if isinstance(m, Staged) and sorted(m.roles.values()) == ["down", "up"]]
        if not pairs:
            raise DeltatuneError("LoRAFA: nothing in training is a product B A; use it with LoRA, or DoRA around it")
        return _Frozen(pairs, projected=self.gradient == "projected")


class _Frozen(Events):
    def __init__(self, deltas: list[Any], *, projected: bool) -> None:
        self.projected = projected
        self.triples: list[tuple[nn.Parameter, nn.Parameter, float]] = []
        for delta in deltas:
            at = {role: getattr(delta, name) for name, role in delta.roles.items()}
            at["down"].requires_grad_(False)  # before the optimizer is made, so that it gets B alone
            self.triples.append((at["down"], at["up"], delta.s))
        self.inverses: dict[nn.Parameter, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def on_grads(self, run: Run) -> None:
        for a, b, s in self.triples if self.projected else ():
            if b.grad is not None:
                wide = torch.promote_types(b.grad.dtype, torch.float32)
                b.grad.copy_(b.grad.to(wide) @ self._inverse(a).to(wide) / s**2)

    def _inverse(self, a: nn.Parameter) -> Tensor:
        """(A A^T + eps)^-1, made again only when something wrote to A."""
        version, inverse = self.inverses.get(a, (-1, a))
        if version != a._version:
            wide = a.to(torch.promote_types(a.dtype, torch.float32))
            gram = wide @ wide.T
            inverse = torch.linalg.inv(gram + EPS * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
            self.inverses[a] = a._version, inverse
        return inverse

    def on_train_end(self, run: Run) -> None:
        for a, _, _ in self.triples:
            a.requires_grad_(True)
