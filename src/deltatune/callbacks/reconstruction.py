"""The loss of autoencoders that are trained with an adapter: alpha mean((P' - P)^2), see `IntrinsicSubspace`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core import Callback, DeltatuneError, Events, Run


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Callback):
    alpha: float

    def start(self, run: Run) -> Events:
        units = [] if run.adapter is None else [unit for _, unit in run.adapter.units()]
        found = [m for unit in units for m in unit.modules() if hasattr(m, "error")]
        if not found:
            raise DeltatuneError("Reconstruction: no autoencoder is in training; leave it out")
        return _Reconstructing(self.alpha, found)


class _Reconstructing(Events):
    """`found`: modules with `error()`, and `given`, whether they have what they are to reconstruct."""

    def __init__(self, alpha: float, found: list[Any]) -> None:
        self.alpha, self.found, self.checked = alpha, found, False

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        if not self.checked and not all(bool(one.given) for one in self.found):
            raise DeltatuneError(
                "IntrinsicSubspace: there are no tuned prompts to find a subspace of; give them by the callback "
                "SourcePrompts(prompts={task: folder}), or attach it with "
                "deltatune.methods.intrinsic_subspace.autoencoder(model, {task: prompt})"
            )
        self.checked = True
        errors = [one.error().to(loss.device) for one in self.found]
        return loss + self.alpha * run.share * torch.stack(errors).sum()
