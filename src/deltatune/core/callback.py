"""Callbacks: everything about how an adapter is trained, as events of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from deltatune.core.config import Config
from deltatune.core.errors import DeltatuneError
from deltatune.core.units import Intervention

Groups = list[dict[str, Any]]  # the optimizer's parameter groups


class Trained(Protocol):
    """What a callback sees of the adapter in training."""

    name: str

    def sites(self) -> Iterator[tuple[str, nn.Module, Intervention, str]]: ...
    def units(self) -> Iterator[tuple[str, Intervention]]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def roles(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass
class Run:
    """A training run as callbacks see it. `step` counts optimizer steps from 1; `adapter` is None when the base trains.

    `share`: the part of the step that is in this micro-batch; a term added to a step's loss is multiplied by it.
    `losses(n)`: the mean losses of up to n batches of the training data, with their graphs, for what is scored before
    training; the run's own order of batches is untouched. None in loops that cannot say.
    `examples()`: for each training example, a function that gives its own mean loss, in one order in all processes.
    `keep_from`: the first step whose weights may be kept as the best; a callback raises it.
    `stage`: the steps, after the first number and up to the second, over which the schedule of the learning rate runs
    with its warm-up; a callback whose stages begin anew sets it. None: all steps.
    `targets`: what each output of this micro-batch is to say, -100 where nothing; `adapters`: those that its rows name.
    `logits`: in `on_loss`, (n, classes) of the n trained positions, for each of `Callback.passes`; () in other loops.
    `exit`: what is to be undone when the run ends, however it ends. `claimed`: see `claim`."""

    model: nn.Module
    adapter: Trained | None
    steps: int
    step: int = 0
    share: float = 1.0
    optimizer: torch.optim.Optimizer | None = None
    losses: Callable[[int], Iterator[Tensor]] | None = None
    examples: Callable[[], Iterator[Callable[[], Tensor]]] | None = None
    keep_from: int = 0
    stage: tuple[int, int] | None = None
    targets: Tensor | None = None
    adapters: Sequence[str | None] | None = None
    logits: Sequence[Tensor] = ()
    exit: ExitStack = field(default_factory=ExitStack)
    claimed: dict[str, str] = field(default_factory=dict)

    def claim(self, what: str, name: str) -> None:
        """The callback `name` does `what`, which one may do. Raises DeltatuneError when another does, or it twice."""
        if what in self.claimed:
            raise DeltatuneError(f"{name}: {self.claimed[what]} {what} in this run already; use one of them")
        self.claimed[what] = name


@dataclass(frozen=True, kw_only=True)
class Callback(Config):
    """Options of a callback; `start` makes the events of one run, so that options stay values.

    `passes`: how many forward passes of a micro-batch it compares; the loss that it is given is that of the first."""

    passes: ClassVar[int] = 1

    def start(self, run: Run) -> Events:
        raise NotImplementedError


class Events:
    """Training events. Each does nothing unless a callback says otherwise."""

    def param_groups(self, groups: Groups) -> Groups:
        """Called once, before the optimizer is made."""
        return groups

    def on_train_start(self, run: Run) -> None:
        """After the optimizer is made, before the first step."""

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        """The loss of one micro-batch, scaled to its share of the step, before its backward pass."""
        return loss

    def on_grads(self, run: Run) -> None:
        """After the backward passes of a step, before clipping."""

    def on_step_end(self, run: Run) -> None:
        """After the optimizer's step, before the gradients are cleared."""

    def on_train_end(self, run: Run) -> None:
        """After the last step, before the weights to keep are put back."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
