"""Starts of a narrow side network: its blocks are pruned copies of the backbone's.

    I = |W|                                   magnitude
    I = mean over losses of (dL/dW)^2         empirical Fisher information

A row or column of a matrix matters as the sum of its I does. LST (Sung et al., NeurIPS 2022, arXiv:2206.06522) prunes
by the second; a loss here is that of a micro-batch, so the closest to single samples are micro-batches of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import DataInit, DeltatuneError, Init, Site, Waiting, using
from deltatune.core.start import Losses


@dataclass(frozen=True, kw_only=True)
class PrunedByMagnitude(Init):
    """Keeps the units with the largest weights; needs no data."""

    def start(self, delta: Any, site: Site) -> None:
        _prune(self, delta, site)


@dataclass(frozen=True, kw_only=True)
class PrunedByFisher(DataInit):
    """Keeps the units with most Fisher information in `batches` micro-batches; by magnitude until there are any."""

    linear: ClassVar[bool] = False

    def start(self, delta: Any, site: Site) -> None:
        _prune(self, delta, site)
        delta.await_data(self)

    def fill(self, sites: Sequence[Waiting], model: nn.Module, losses: Losses) -> None:
        sums: dict[nn.Module, list[Tensor]] = {}
        with using(model), _watching(sites[0].delta.matrices(model), sums) as leaves, torch.enable_grad():
            for loss in losses(self.batches):
                torch.autograd.grad(loss, leaves, allow_unused=True)
                leaves.clear()
        for site in sites:
            if missing := [m for m in site.delta.matrices(model) if m not in sums]:
                raise DeltatuneError(f"PrunedByFisher: no gradient reached a {type(missing[0]).__name__} of the blocks")
            site.delta.prune(model, lambda m: (sums[m][0], sums[m][1]))


def _prune(init: Init, delta: Any, site: Site) -> None:
    if not hasattr(delta, "prune"):
        raise DeltatuneError(
            f"{type(init).__name__} starts a side network; {type(delta).__name__} has no block to prune"
        )
    if site.device.type != "meta":
        delta.prune(site.model)


@contextmanager
def _watching(modules: Sequence[nn.Module], sums: dict[nn.Module, list[Tensor]]) -> Iterator[list[Tensor]]:
    """Inside, each backward pass adds the sums over rows and columns of (dL/dW)^2 to `sums`. Yields the tensors that
    gradients must be asked of: a frozen base has none of its own."""
    leaves: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args[0].requires_grad:
            return None
        leaves.append(args[0].detach().requires_grad_())
        return leaves[-1], *args[1:]

    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)

        def add(dy: Tensor) -> None:
            wide = torch.promote_types(x.dtype, torch.float32)
            g = (dy.flatten(0, -2).to(wide).T @ x.to(wide)).square()
            now = g.sum(1), g.sum(0)
            sums[module] = [old + new for old, new in zip(sums[module], now, strict=True)] if module in sums else [*now]

        y.register_hook(add)

    handles: list[Any] = [m.register_forward_pre_hook(begin) for m in modules]
    handles += [m.register_forward_hook(hook) for m in modules]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
