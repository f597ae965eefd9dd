"""Examples to tensors: documents packed into rows without seeing one another, or padded rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Any

import torch
from torch import Tensor

from deltatune.core.errors import DeltatuneError
from deltatune.data.encode import IGNORED, Example, Task
from deltatune.kernels.attention import Blocks


@dataclass(frozen=True)
class Batch:
    """``model(**inputs)`` gives the logits for ``labels`` [b, T] (not shifted; [b] for classification).

    ``segments`` [b, T] numbers the documents of each row from 0, -1 on padding; ``origins[i]`` says where the
    documents of row ``i`` came from; ``tokens`` and ``trained_tokens`` count without padding. ``blocks`` is the layout
    of a row that needs a model which understands it. ``adapters`` are those that the rows name, None if they do not."""

    inputs: dict[str, Any]
    labels: Tensor
    segments: Tensor
    origins: list[list[str]]
    tokens: int
    trained_tokens: int
    blocks: Blocks | None = None
    adapters: tuple[str | None, ...] | None = None

    def to(self, device: torch.device | str) -> Batch:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=moved, labels=self.labels.to(device), segments=self.segments.to(device))


def pack(lengths: Sequence[int], capacity: int, seed: int, window: int = 1024) -> list[list[int]]:
    """Bins of indices whose ``lengths`` sum to at most ``capacity``, the same for the same ``seed``.

    The documents are shuffled; within each ``window`` of them, best fit by decreasing length; then the bins are
    shuffled, so that long documents do not come first."""
    random, bins = Random(seed), []
    order = list(range(len(lengths)))
    random.shuffle(order)
    for begin in range(0, len(order), window):
        filled: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
        for index in sorted(order[begin : begin + window], key=lambda i: -lengths[i]):
            at = bisect_left(room, (lengths[index], -1))
            if at < len(room):
                left, bin = room.pop(at)
                filled[bin].append(index)
            elif lengths[index] > capacity:
                raise DeltatuneError(f"a document of {lengths[index]} tokens does not fit into a row of {capacity}")
            else:
                left, bin = capacity, len(filled)
                filled.append([index])
            insort(room, (left - lengths[index], bin))
        random.shuffle(filled)
        bins += filled
    return bins


def packed(rows: Sequence[Sequence[Example]], pad: int) -> Batch:
    """One row [T] per list of documents, T the longest row: positions restart at every document.

    `transformers` derives the block-diagonal mask from the positions if there is neither an attention mask nor a
    cache, hence ``use_cache``; for other models there is `attention_mask_4d`."""
    length = max(sum(len(e.input_ids) for e in row) for row in rows)
    shape = (len(rows), length)
    ids, labels, segments = torch.full(shape, pad), torch.full(shape, IGNORED), torch.full(shape, -1)
    positions = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        end = 0
        for segment, example in enumerate(row):
            start, end = end, end + len(example.input_ids)
            ids[i, start:end], labels[i, start:end] = torch.tensor(example.input_ids), torch.tensor(example.labels)
            labels[i, start], segments[i, start:end] = IGNORED, segment
            positions[i, start:end] = torch.arange(end - start)
        positions[i, end:] = torch.arange(length - end)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    return _batch(inputs, labels, segments, [[example.origin for example in row] for row in rows])


def blocked(examples: Sequence[Example]) -> Batch:
    """One row [1, T] without padding: what all documents begin with, once, then the rest of each, and its layout.

    Every token before a trained one is a document's own. ``tokens`` counts those of the documents, shared ones in each;
    what they share is of segment 0, as the first document's."""
    shared = _shared(examples)
    ends = [example.input_ids[shared:] for example in examples]
    layout = Blocks(shared, tuple(map(len, ends)))
    ids = torch.tensor([[*examples[0].input_ids[:shared], *chain.from_iterable(ends)]])
    labels = torch.tensor([[IGNORED] * shared + [t for e in examples for t in (IGNORED, *e.labels[shared + 1 :])]])
    positions = torch.tensor([[*range(shared), *(shared + i for end in ends for i in range(len(end)))]])
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    made = _batch(inputs, labels, (layout.documents - 1).clamp(min=0)[None], [[e.origin for e in examples]])
    return replace(made, tokens=sum(map(len, examples)), blocks=layout)


def _shared(examples: Sequence[Example]) -> int:
    """How many tokens all begin with; the first token after them predicts, but nothing before it is predicted."""
    if len(examples) < 2:
        return 0
    untrained = (next((i for i, t in enumerate(e.labels) if i and t != IGNORED), len(e.labels)) for e in examples)
    most = max(0, min(untrained) - 1)
    columns = zip(*(example.input_ids[:most] for example in examples), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), most)


def padded(examples: Sequence[Example], pad: int, task: Task = "causal", side: str = "right") -> Batch:
    """One row per example, padded to the longest on ``side``; the labels too, as the task has them.

    With left padding causal rows carry ``position_ids`` that count from the first real token."""
    ids, mask = _pad([e.input_ids for e in examples], pad, side)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if task == "classification":
        labels = torch.tensor([example.labels[0] for example in examples])
    else:
        labels = _pad([e.labels for e in examples], IGNORED, "right" if task == "seq2seq" else side)[0]
    if task == "causal" and side == "left":
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    made = _batch(inputs, labels, mask - 1, [[example.origin] for example in examples])
    return replace(made, adapters=tuple(e.adapter for e in examples)) if examples[0].adapter is not None else made


def attention_mask_4d(segments: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``segments`` [b, T] to an additive causal mask [b, 1, T, T]: 0 within a document, the least number elsewhere."""
    same = (segments[:, :, None] == segments[:, None, :]).tril()
    open_ = torch.zeros(same.shape, dtype=dtype, device=segments.device)
    return open_.masked_fill(~same, torch.finfo(dtype).min)[:, None]


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), value), torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, at], mask[i, at] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def _batch(inputs: dict[str, Any], labels: Tensor, segments: Tensor, origins: list[list[str]]) -> Batch:
    return Batch(inputs, labels, segments, origins, int((segments >= 0).sum()), int((labels != IGNORED).sum()))
