"""Choosing what a selective method trains: dense gradients of the weights under its units, and the best of all places.

Scores are taken over single examples, without dropout, with the adapter in place and nothing but the scores kept: a
dense gradient is folded into its site's sum as soon as the backward pass has made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Groups, Run

Loss = Callable[[], Tensor]
Add = Callable[[Tensor, Tensor], Any]
Units = Sequence[Any]  # with `size`, `chosen`, `watch`, `values` and `move_to`: see `methods.coordinates`


class Selective(Protocol):
    """A method that says how its units' places are chosen and trained."""

    def begin(self, run: Run, units: Units) -> Events: ...


@dataclass(frozen=True, kw_only=True)
class Selection(Callback):
    """Trains the units that `method` built, wherever they are nested, as it says."""

    method: Any

    def start(self, run: Run) -> Events:
        found = [] if run.adapter is None else [m for _, unit in run.adapter.units() for m in unit.modules()]
        units = [m for m in found if getattr(m, "method", None) == self.method]
        if not units:
            raise DeltatuneError(f"{type(self.method).__name__}: the adapter in training has no unit of it")
        return self.method.begin(run, units)


class Once(Events):
    """Chooses places before the first step. An adapter that has its places, a loaded one say, keeps them."""

    def __init__(self, units: Units, choose: Callable[[Run, Units], Sequence[Tensor]]) -> None:
        self.units, self.choose = units, choose

    def on_train_start(self, run: Run) -> None:
        if run.step == 0 and not is_chosen(self.units):
            settle(self.units, self.choose(run, self.units))


class TwoPhases(Events):
    """Phase 1, `share` of the steps, trains all places, to choose those of phase 2. Its weights are never the best.
    `lr`: its learning rate, where that is not the run's.

    `turn`: the last step of phase 1; 0 for an adapter that has its places and only goes on with them."""

    def __init__(self, method: Any, share: float, run: Run, units: Units, lr: float | None = None) -> None:
        self.method, self.share, self.lr, self.run, self.units, self.turn = method, share, lr, run, units, 0

    def choose(self) -> None:
        """After phase 1: settle the units."""
        raise NotImplementedError

    def param_groups(self, groups: Groups) -> Groups:
        if self.lr is None or is_chosen(self.units):
            return groups
        own, split = {id(u.values) for u in self.units}, Groups()
        for g in groups:
            rest, mine = ([p for p in g["params"] if (id(p) in own) is here] for here in (False, True))
            split += [{**g, "params": rest}, {**g, "params": mine, "lr": self.lr, "then": g.get("lr")}]
        return split

    def on_train_start(self, run: Run) -> None:
        if run.step or is_chosen(self.units):
            return
        self.turn = max(1, round(self.share * run.steps))
        if self.turn >= run.steps:
            raise DeltatuneError(
                f"{type(self.method).__name__}: a first phase of {self.share} of {run.steps} steps leaves no "
                "step for the second; shorten it, or train longer"
            )
        run.keep_from = max(run.keep_from, self.turn + 1)
        for u in self.units:
            u.move_to(torch.arange(u.size, device=u.indices.device))

    @torch.no_grad()
    def on_step_end(self, run: Run) -> None:
        if run.step == self.turn:
            self.choose()
            if run.adapter is not None:  # a new optimizer, so to say
                forget(run, run.adapter.parameters())
            if (optimizer := run.optimizer) is not None:
                for g in (g for g in optimizer.param_groups if "then" in g):
                    g["lr"] = g["initial_lr"] = g.pop("then") or optimizer.defaults["lr"]

    def state_dict(self) -> dict[str, Tensor]:
        return {"turn": torch.tensor(self.turn)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.turn = int(state["turn"])
        self.run.keep_from = max(self.run.keep_from, self.turn + 1)


def is_chosen(units: Units) -> bool:
    return all(bool(u.chosen) for u in units)


def settle(units: Units, places: Sequence[Tensor]) -> None:
    """Move every unit to its places, for good."""
    for unit, mine in zip(units, places, strict=True):
        unit.move_to(mine)
        unit.chosen.fill_(True)
    rest(units)


def rest(units: Units) -> None:
    """Let units without a place train nothing: no gradient is expected of them."""
    for unit in units:
        unit.values.requires_grad_(unit.values.numel() > 0)


def forget(run: Run, parameters: Iterable[nn.Parameter]) -> None:
    """Drop what the optimizer remembers of these parameters, as if it were new."""
    if run.optimizer is not None:
        for p in parameters:
            run.optimizer.state.pop(p, None)


def examples(run: Run) -> Iterator[Loss]:
    """The training data, example by example. Raises DeltatuneError in a loop that does not offer it."""
    if run.examples is None:
        raise DeltatuneError("the places to train are chosen by the training data: train with deltatune, whose loop "
                             "gives callbacks Run.examples, or give it in your own loop")  # fmt: skip
    return run.examples()


def hardest(run: Run, units: Units, n: int) -> list[Loss]:
    """The n training examples with the largest mean loss. The units' W' are made once for all of them."""
    data = list(examples(run))
    with at_rest(run.model), torch.no_grad(), watched(units, [_Made() for _ in units]):
        losses = torch.stack([example().float() for example in data])
    return [data[i] for i in losses.topk(min(n, len(data))).indices.tolist()]


@contextmanager
def watched(units: Units, watches: Sequence[Callable[[Callable[[], Tensor]], Tensor]]) -> Iterator[None]:
    """Inside, the units' W' are what `watches` make of them."""
    try:
        for unit, watch in zip(units, watches, strict=True):
            unit.watch = watch
        yield
    finally:
        for unit in units:
            unit.watch = None


class _Made:
    """W' as it was at the first call."""

    made: Tensor | None = None

    def __call__(self, make: Callable[[], Tensor]) -> Tensor:
        if self.made is None:
            self.made = make().detach()
        return self.made


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model without dropout; as it was, afterwards."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Watch:
    """Gives a unit its W' as a leaf, and adds to `total` (size,) by `add(total, dL/dW')` when the gradient is there."""

    def __init__(self, total: Tensor, add: Add) -> None:
        self.total, self.add, self.leaf = total, add, None  # type: tuple[Tensor, Add, Tensor | None]

    def __call__(self, made: Callable[[], Tensor]) -> Tensor:
        if self.leaf is None:  # one for all calls of the module, whose gradients add up before the hook
            self.leaf = made().detach().requires_grad_()
            self.leaf.register_post_accumulate_grad_hook(self._take)
        return self.leaf

    def _take(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.add(self.total, leaf.grad.to(self.total).flatten())
        leaf.grad = None


def total_over(run: Run, units: Units, losses: Iterable[Loss], add: Add) -> list[Tensor]:
    """What `add(total, dL/dW')`, in place, makes of zeros over the losses, (size,) for each unit. No parameter's `grad`
    is touched."""
    wide = torch.promote_types(units[0].values.dtype, torch.float32)
    totals = [torch.zeros(u.size, dtype=wide, device=u.values.device) for u in units]
    watches = [_Watch(total, add) for total in totals]
    with at_rest(run.model), torch.enable_grad(), watched(units, watches):
        for loss in losses:
            value = loss()
            leaves = [watch.leaf for watch in watches if watch.leaf is not None]
            if not leaves:
                raise DeltatuneError("the model ran without the adapter whose places are chosen; activate it")
            value.backward(inputs=leaves)
    return totals


def squares(total: Tensor, gradient: Tensor) -> Tensor:
    """Fisher's diagonal, times the number of examples: the sum of squared gradients."""
    return total.addcmul_(gradient, gradient)


def best(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The places of the k largest scores of all, ascending, for each of `scores`."""
    whole = torch.cat([s.to(scores[0].device) for s in scores])
    chosen = torch.zeros_like(whole, dtype=torch.bool)
    chosen[whole.topk(k).indices] = True
    parts = chosen.split([len(s) for s in scores])
    return [part.nonzero().flatten().to(s.device) for part, s in zip(parts, scores, strict=True)]


def number(units: Units, share: float) -> int:
    """int(share N) of all N places of the units."""
    return int(share * sum(u.size for u in units))
