"""The losses of training data, for what is scored before or between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

import torch
from torch import Tensor, nn

from deltatune.data.loader import Batches
from deltatune.data.packing import Batch
from deltatune.train.loss import autocast, outcome


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
