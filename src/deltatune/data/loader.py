"""Batches without end, from a cursor that can be saved and restored exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from random import Random
from typing import Any, TypeVar

from deltatune.core.errors import DeltatuneError
from deltatune.data.encode import Example, Task
from deltatune.data.packing import Batch, blocked, pack, packed, padded

T = TypeVar("T")
_GROUP = 1024  # examples sorted by length at a time


class Batches:
    """An endless iterator of batches, epoch after epoch, each in its own order.

    Give one of ``tokens_per_batch`` (tokens in the tensor, padding included) and ``batch_size`` (rows). With
    ``packing`` a row holds up to ``max_length`` tokens of several documents; ``blocked``, a batch is one such row of
    ``tokens_per_batch``, for a model that understands its layout (`models.blocks`). ``rank`` of ``world`` processes
    takes every ``world``-th batch; all of them make equally many, so an epoch leaves out the few that do not divide."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        pad: int = 0,
        task: Task = "causal",
        tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        packing: bool = False,
        blocked: bool = False,
        max_length: int | None = None,
        group_by_length: bool = False,
        side: str = "right",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if (tokens_per_batch is None) == (batch_size is None):
            raise DeltatuneError("give exactly one of tokens_per_batch and batch_size")
        if packing and task != "causal":
            raise DeltatuneError(f"packing: only causal examples can share a row, not those of task {task!r}")
        if blocked and not (packing and tokens_per_batch):
            raise DeltatuneError("blocked: needs packing and tokens_per_batch, the size of its one row")
        if not examples:
            raise DeltatuneError("there are no examples to make batches of")
        without = next((example for example in examples if example.adapter is None), None)
        if (named := next((e for e in examples if e.adapter is not None), None)) and (without or packing):
            why = f"{without.origin} names none: all do, or none" if without else "packing is on: set it to false"
            raise DeltatuneError(f"{named.origin} names its adapter, {named.adapter!r}, but {why}")
        self.lengths = [len(example) for example in examples]
        longest = max(self.lengths)
        self.capacity = min(max_length or longest, tokens_per_batch or max_length or longest)
        if blocked and tokens_per_batch:
            self.capacity = tokens_per_batch
        place, most = ("a row", self.capacity) if packing else ("a batch", tokens_per_batch or longest)
        if longest > most:
            raise DeltatuneError(
                f"{examples[self.lengths.index(longest)].origin}: {longest} tokens do not fit into {place} of {most}; "
                "raise tokens_per_batch, or cut rows by max_length"
            )
        self.examples, self.pad, self.task, self.packing, self.side = examples, pad, task, packing, side
        self.blocked = blocked
        self.tokens_per_batch, self.batch_size, self.group_by_length = tokens_per_batch, batch_size, group_by_length
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.step = 0
        self._planned: tuple[int, list[list[list[int]]]] = (-1, [])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        plan = self._plan(self.epoch)
        batch = self._collate(plan[self.step * self.world + self.rank])
        self.step += 1
        if self.step == len(self):
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    def __len__(self) -> int:
        """Batches of this rank in the current epoch; packing may make one more or fewer in another."""
        return len(self._plan(self.epoch)) // self.world

    def count(self, epochs: int) -> int:
        """Batches of this rank in the first ``epochs`` epochs."""
        return sum(len(self._make(epoch)) // self.world for epoch in range(epochs))

    def once(self) -> Iterator[Batch]:
        """One pass over every example, for evaluation; the cursor stays where it is."""
        return map(self._collate, self._make(0, whole=True)[self.rank :: self.world])

    def alone(self, index: int) -> Batch:
        """One example in a batch of its own."""
        return padded([self.examples[index]], self.pad, self.task, self.side)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step, "data": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the batch after the last one drawn when ``state`` was taken, bit for bit.

        Raises `DeltatuneError` if the data or the settings that decide the order are others."""
        if state["data"] != self._fingerprint:
            raise DeltatuneError(
                "resume: the examples, the seed, or the batch settings are not those of the saved run, so it cannot "
                "continue where it stopped; restore them, or start a new run"
            )
        self.epoch, self.step = state["epoch"], state["step"]

    @cached_property
    def _fingerprint(self) -> str:
        settings = (self.seed, self.world, self.packing, self.blocked, self.capacity, self.tokens_per_batch,
                    self.batch_size, self.group_by_length, self.side, self.task, self.pad)  # fmt: skip
        digest = hashlib.sha256(repr(settings).encode())
        for example in self.examples:
            digest.update(repr((example.input_ids, example.labels)).encode())
            digest.update((example.adapter or "").encode())
        return digest.hexdigest()[:16]

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        if self._planned[0] != epoch:
            self._planned = epoch, self._make(epoch)
        return self._planned[1]

    def _make(self, epoch: int, whole: bool = False) -> list[list[list[int]]]:
        """The batches of an epoch, each a list of rows, each a list of example indices."""
        random = Random(f"{self.seed}:{epoch}")
        if self.packing:
            rows = pack(self.lengths, self.capacity, random.randrange(2**32))
            plan = list(self._cut(rows, [self.capacity] * len(rows)))
        else:
            order = list(range(len(self.lengths)))
            random.shuffle(order)
            if self.group_by_length:
                order = [i for at in range(0, len(order), _GROUP) for i in self._sorted(order[at : at + _GROUP])]
            plan = list(self._cut([[index] for index in order], [self.lengths[index] for index in order]))
            if self.group_by_length:
                random.shuffle(plan)
        if not whole and len(plan) % self.world:
            plan = plan[: len(plan) // self.world * self.world] or (plan * self.world)[: self.world]
        return plan

    def _sorted(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=self.lengths.__getitem__)

    def _cut(self, rows: list[list[int]], lengths: list[int]) -> Iterator[list[list[int]]]:
        """Consecutive rows, as many as fit into a batch once padded to the longest of them."""
        batch: list[list[int]] = []
        longest = 0
        for row, length in zip(rows, lengths, strict=True):
            longest, size = max(longest, length), len(batch) + 1
            if batch and (size > self.batch_size if self.batch_size else longest * size > (self.tokens_per_batch or 0)):
                yield batch
                batch, longest = [], length
            batch.append(row)
        yield batch

    def _collate(self, rows: list[list[int]]) -> Batch:
        if self.blocked:
            return blocked([self.examples[i] for row in rows for i in row])
        if self.packing:
            return packed([[self.examples[i] for i in row] for row in rows], self.pad)
        return padded([self.examples[i] for row in rows for i in row], self.pad, self.task, self.side)


def split(examples: Sequence[T], held_out: str | int, seed: int = 0) -> tuple[list[T], list[T]]:
    """(kept, held out), both in their old order: ``held_out`` is a count, or a share such as ``5%`` (at least one)."""
    try:
        share = float(held_out[:-1]) / 100 if isinstance(held_out, str) and held_out.endswith("%") else None
        n = int(held_out) if share is None else max(1, round(share * len(examples)))
    except ValueError:
        n = -1
    if not 0 < n < len(examples):
        raise DeltatuneError(
            f"eval: {held_out!r} of {len(examples)} rows cannot be held out; give a share such as '5%' or a count from "
            f"1 to {len(examples) - 1}"
        )
    held = set(Random(seed).sample(range(len(examples)), n))
    return [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in sorted(held)]
