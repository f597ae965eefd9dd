"""A small network in float64, a LoRA on it, and training step by step as the loop does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import Callback, Events, Run


def begin(callback: Callback, steps: int, method: Any = None, lr: float = 1e-2) -> tuple[nn.Module, Run, Events]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(14, 12), nn.Tanh(), nn.Linear(12, 13)).double()
    adapter = dt.attach(net, method or dt.LoRA(r=3, alpha=6, targets=nn.Linear))
    run = Run(net, adapter, steps)
    events = callback.start(run)
    run.optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    for group in run.optimizer.param_groups:
        group["initial_lr"] = lr
    events.on_train_start(run)
    return net, run, events


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, n, generator=g, dtype=torch.float64) for n in (14, 13))
    return x, y


def loss(net: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return (net(x) - y).square().mean()


def go(run: Run, events: Events, until: int, before_end: Callable[[int], None] = lambda step: None) -> None:
    """Train to step `until`; `before_end(step)` runs between the optimizer's step and `on_step_end`."""
    while run.step < until:
        run.step += 1
        loss(run.model, run.step).backward()
        events.on_grads(run)
        run.optimizer.step()
        before_end(run.step)
        events.on_step_end(run)
        run.optimizer.zero_grad(set_to_none=True)


def deltas(run: Run) -> list[Any]:
    return [m for _, u in run.adapter.units() for m in u.modules() if hasattr(m, "unload")]


def change(delta: Any) -> Tensor:
    """W' - W."""
    up, down = delta.factors()
    return (up @ down).detach().clone()


def trained(delta: Any) -> Tensor:
    """s B A, without what is kept."""
    return (delta.s * delta.b @ delta.a).detach().clone()
