"""The losses of data, for what is scored before or between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltatune.core import Adapter, initialise
from deltatune.core.start import waiting
from deltatune.data import Encoded
from deltatune.data.encode import Task
from deltatune.data.loader import Batches
from deltatune.data.packing import Batch
from deltatune.train.batching import Packing, batches
from deltatune.train.loss import autocast, outcome
from deltatune.train.options import TrainOptions


@dataclass(frozen=True)
class TrainingData:
    """Mean losses with their graphs; the run's own order of batches is untouched."""

    model: nn.Module
    batches: Batches
    device: torch.device
    dtype: torch.dtype

    def losses(self, n: int) -> Iterator[Tensor]:
        """Of the first n batches of a pass, the same in all processes, so that they decide alike."""
        every = copy(self.batches)
        every.rank, every.world = 0, 1
        return map(self._mean, islice(every.once(), n))

    def examples(self) -> Iterator[Callable[[], Tensor]]:
        """Of each example by itself, computed when called for, in a random order that all processes share."""
        n = len(self.batches.examples)
        return (partial(self._alone, i) for i in Random(self.batches.seed).sample(range(n), n))

    def _alone(self, index: int) -> Tensor:
        return self._mean(self.batches.alone(index))

    def _mean(self, batch: Batch) -> Tensor:
        with autocast(self.device, self.dtype):
            found = outcome(self.model, batch.to(self.device), self.batches.task)
        return found.total / max(1, found.targets)


How = tuple[PreTrainedTokenizerBase, TrainOptions, Task, Packing, int, int]  # the arguments of `batches` after the rows


def begin(adapter: Adapter, rows: Mapping[str, Encoded], how: How, device: torch.device) -> None:
    """Before training, start what starts from data of its own: `rows`, by the name that its init gives."""
    tokenizer, options, task, _, longest, seed = how
    for name, some in rows.items():
        if name not in [init.data for init in waiting(adapter)]:  # it was started by hand
            continue
        if not getattr(adapter.model, "hf_device_map", None):
            adapter.model.to(device)
        made = batches(some, tokenizer, options, task, "none", longest, seed)
        initialise(adapter, TrainingData(adapter.model, made, device, options.dtype(device)).losses, name)
