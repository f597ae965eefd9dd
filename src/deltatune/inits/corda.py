"""CorDA: Context-Oriented Decomposition Adaptation of Large Language Models. Yang et al., NeurIPS 2024.
arXiv:2406.05223

    C = X' X,    W C = U S V',    W = U S (V' C^-1)                                        (sec. 3.2)
    B = U_i (S_i / s)^1/2,    A = (S_i / s)^1/2 (V' C^-1)_i,    i: r of the components      (sec. 3.3)

X (tokens, in) are the inputs of the layer. Instruction-previewed adaptation trains the leading components of the task's
own data; knowledge-preserved adaptation trains the last ones, so that what the data show is touched least. The product
does not depend on the scale of C, which is set to a mean diagonal of one: white inputs give PiSSA. No inverse is taken,
because S V' C^-1 = U' W. So that there is one, the diagonal of C is raised by 0.01 of its mean, or 0.02, 0.04, …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import DataInit, DeltatuneError, Waiting
from deltatune.core.start import Losses, inputs, within

_DAMPING, _INVERTED = 0.01, 0.05  # the least, of the mean diagonal; how far C C^-1 may be from the identity


@dataclass(frozen=True, kw_only=True)
class CorDA(DataInit):
    """Instruction-previewed: the leading r components."""

    batches: int = 32

    @torch.no_grad()
    def fill(self, sites: Sequence[Waiting], model: nn.Module, losses: Losses) -> None:
        for group in within([s.module for s in sites], lambda m: next(_weight(s, m) for s in sites if s.module is m)):
            moments: dict[nn.Module, Tensor] = {}

            def see(module: nn.Module, x: Tensor, moments: dict[nn.Module, Tensor] = moments) -> None:
                moments[module] = moments.get(module, x.new_zeros(())) + x.T @ x

            with inputs(model, group, see):
                for _ in losses(self.batches):
                    pass
            for site in sites:
                if site.module in group:
                    if site.module not in moments:
                        raise DeltatuneError(f"{type(self).__name__}: no batch ran through {site.path!r}; leave it out")
                    site.delta.start_from(*self.factors(site, invertible(moments[site.module])))

    def factors(self, site: Waiting, c: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A) for a weight whose inputs have the second moment `c` (in, in)."""
        w, r, s = site.weight, len(site.delta.a), site.delta.s
        if r > min(w.shape) or s <= 0:
            raise DeltatuneError(
                f"{type(self).__name__}: {site.path!r}: r={r}, s={s}, weight {tuple(w.shape)}: "
                f"give r <= {min(w.shape)} and alpha > 0"
            )
        u, sigma, _ = torch.linalg.svd(w @ c.to(w), full_matrices=False)
        u, sigma = u[:, self.chosen(r)], sigma[self.chosen(r)]
        return u * (sigma / s).sqrt(), (u.T @ w) / (sigma * s).sqrt()[:, None]

    def chosen(self, r: int) -> slice:
        return slice(r)


@dataclass(frozen=True, kw_only=True)
class CorDAPreserved(CorDA):
    """Knowledge-preserved: the last r components. `data` are those whose answers are to stay, not the training data;
    None where they are given to `initialise`."""

    apart: ClassVar[bool] = True

    def chosen(self, r: int) -> slice:
        return slice(-r, None)


def invertible(moment: Tensor) -> Tensor:
    """`moment` (in, in) with a raised diagonal, as little as lets it be inverted, of mean one."""
    scale = moment.diagonal().mean()
    if not bool(scale > 0):
        raise DeltatuneError("CorDA: the inputs are all zero; give other data")
    one, damping = torch.eye(len(moment)).to(moment), _DAMPING
    while True:
        c = (moment / scale + damping * one) / (1 + damping)
        inverse, failed = torch.linalg.inv_ex(c)
        if not bool(failed) and bool(torch.linalg.matrix_norm(c @ inverse - one) < _INVERTED):
            return c
        damping *= 2


def _weight(site: Waiting, module: nn.Module) -> int:
    return site.delta.a.shape[1] ** 2
