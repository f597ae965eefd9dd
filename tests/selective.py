"""What the tests of selective methods share: a small float64 network, its data, and a loop with the events of `fit`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import Events, Run


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5)).double().train()


def data(n: int = 12, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.5, 2, n).tolist()
    return [(s * torch.randn(1, 6, generator=g).double(), torch.randn(1, 5, generator=g).double()) for s in size]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def begin(method: dt.core.Method, steps: int, model: nn.Module | None = None, **adamw: Any
          ) -> tuple[nn.Module, dt.Adapter, Run, Events]:  # fmt: skip
    """As `fit` begins: adapter, events, optimizer, the start of training."""
    model = network() if model is None else model
    adapter = dt.attach(model, method)
    run = Run(model, adapter, steps, examples=lambda: iter([partial(loss, model, x, y) for x, y in data()]))
    (events,) = (c.start(run) for c in adapter.callbacks())
    groups = events.param_groups([{"params": list(adapter.parameters())}])
    run.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], **{"lr": 1e-2, "weight_decay": 0.1} | adamw)
    events.on_train_start(run)
    return model, adapter, run, events


def go(run: Run, events: Events, until: int, seen: Callable[[int], None] = lambda step: None) -> None:
    """Train to step `until` without dropout; `seen` is called after every optimizer step, before its event."""
    assert run.optimizer is not None and run.adapter is not None
    for m in run.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    while run.step < until:
        run.step += 1
        g = torch.Generator().manual_seed(run.step)
        x, y = torch.randn(8, 6, generator=g).double(), torch.randn(8, 5, generator=g).double()
        events.on_loss(run, loss(run.model, x, y)).backward()
        events.on_grads(run)
        run.optimizer.step()
        seen(run.step)
        events.on_step_end(run)
        run.optimizer.zero_grad()


def resumed(method: dt.core.Method, steps: int, kept: Any, step: int) -> tuple[nn.Module, dt.Adapter, Run, Events]:
    """A new process going on from what `snapshot` kept, in the order of `fit`; it may not score anything again."""
    model = network()
    adapter = dt.attach(model, method)
    run = Run(model, adapter, steps, step=step)
    (events,) = (c.start(run) for c in adapter.callbacks())
    groups = events.param_groups([{"params": list(adapter.parameters())}])
    run.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, weight_decay=0.1)
    events.on_train_start(run)
    adapter.load_state_dict(kept[0])
    run.optimizer.load_state_dict(kept[1])
    events.load_state_dict(kept[2])
    run.examples = lambda: iter([partial(loss, model, x, y) for x, y in data()])
    return model, adapter, run, events


def snapshot(adapter: dt.Adapter, run: Run, events: Events) -> Any:
    assert run.optimizer is not None
    return copy.deepcopy((adapter.state_dict(), run.optimizer.state_dict(), events.state_dict()))


def changed(model: nn.Module) -> dict[str, Tensor]:
    """Where merging the active adapter changes the base, bit for bit; the model is left as it was."""
    names = [n for n, _ in model.named_parameters() if "adapters" not in n.split(".")]
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    dt.merge(model)
    after = {n: model.get_parameter(n).detach().clone() for n in names}
    dt.unmerge(model)
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in names)
    return {n: before[n] != after[n] for n in names}


def marked(adapter: dt.Adapter) -> dict[str, Tensor]:
    """The places of the adapter's units, as masks."""
    masks = {}
    for path, module, unit, at in adapter.sites():
        mask = torch.zeros(getattr(module, at).numel(), dtype=torch.bool)
        mask[unit.indices.long()] = True  # type: ignore[union-attr, operator]
        masks[f"{path}.{at}"] = mask.view(getattr(module, at).shape)
    return masks


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def gradients(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """The gradient of every parameter of a plain model, example by example, without dropout."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    found = []
    for x, y in pairs:
        model.zero_grad()
        loss(model, x, y).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return found


def top(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of the k largest of all."""
    least = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[k - 1]
    return {n: s >= least for n, s in scores.items()}
