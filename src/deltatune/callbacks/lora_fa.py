"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning. Zhang et al., 2023.
arXiv:2308.03303

    W' = W + s B A,   A at random and frozen, B trained
    g_B' = 1/s^2  g_B (A A^T)^-1        g_B = dL/dB = s G A^T,  G = dL/dW'

With A frozen the backward pass of B needs h = A x, r numbers a token, and no longer x, `in` numbers. Of all steps of B,
g_B' moves W' nearest to the full gradient: s g_B' A is the projection of G onto the row space of A, the minimum of
|| s g A - G ||_F over g. A A^T + 1e-8 is inverted in fp32 or wider, once, for A does not change. The projected gradient
is what is clipped and given to the optimizer. `gradient="plain"` is the paper's first version. Sites that share B A,
as in LoRA-drop, move together: G is the sum of theirs, and g_B is projected once.
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
        modules = () if run.adapter is None else ((name, m) for name, u in run.adapter.units() for m in u.modules())
        pairs = [(n, m) for n, m in modules if isinstance(m, Staged) and sorted(m.roles.values()) == ["down", "up"]]
        if not pairs:
            raise DeltatuneError("LoRAFA: nothing in training is a product B A; use it with LoRA, or DoRA around it")
        return _Frozen(pairs, projected=self.gradient == "projected")


class _Frozen(Events):
    def __init__(self, deltas: list[tuple[str, Any]], *, projected: bool) -> None:
        self.frozen: set[nn.Parameter] = set()
        self.products: dict[nn.Parameter, tuple[nn.Parameter, float]] = {}  # of each B that is projected, A and s
        for name, delta in deltas:
            at = {role: getattr(delta, key) for key, role in delta.roles.items()}
            a, b = at["down"], at["up"]
            self.frozen.add(a)
            if projected:
                other, s = self.products.setdefault(b, (a, delta.s))
                if other is not a or s != delta.s:
                    raise DeltatuneError(
                        f"LoRAFA: {name} shares its B with a unit of another A or scale, so B has no one projected "
                        'gradient; share A and the scale as well, or give gradient="plain"'
                    )
        for a in self.frozen:
            a.requires_grad_(False)  # before the optimizer is made, so that it gets B alone
        self.inverses: dict[nn.Parameter, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def on_grads(self, run: Run) -> None:
        for b, (a, s) in self.products.items():
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
        for a in self.frozen:
            a.requires_grad_(True)
