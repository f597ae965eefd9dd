"""This process among others, each with the whole model and every n-th batch: what they agree on, and how they stop.

Gradients are summed once per step, after accumulation, and only those that train: for an adapter one small message.
Nothing wraps the model, so callbacks may freeze and thaw, and experts may go without tokens, at any step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from deltatune.core.errors import DeltatuneError

PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Processes:
    """The processes of this run: one alone, or those that `accelerate launch` started."""

    def __init__(self) -> None:
        accelerator = Accelerator()
        if accelerator.distributed_type not in PLAIN:
            raise DeltatuneError(
                f"{accelerator.distributed_type.value} shards the model, which this loop does not do; "
                "launch with --multi_gpu or --multi_cpu, or train with transformers' Trainer"
            )
        self.accelerator, self.device = accelerator, accelerator.device
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.main = accelerator.is_main_process

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, summed over the processes."""
        if self.world == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        return [value] if self.world == 1 else gather_object([value])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process the first one's values: adapters begin at random."""
        if self.world > 1:
            for t in tensors:
                dist.broadcast(t.detach(), 0)

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums gradients over the processes; a parameter without one stays without if no process has one."""
        if self.world == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        has = self.sum([float(p.grad is not None) for p in trained])
        some = [p for p, n in zip(trained, has, strict=True) if n]
        for dtype in sorted({p.dtype for p in some}, key=str):
            mine = [p for p in some if p.dtype is dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in mine])
            dist.all_reduce(flat)
            for p, g in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
                p.grad = g.view_as(p).clone()


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM is put into, for the loop to see between steps; a second acts at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
