"""Rows of data to the batches of a run: padded, or packed as the model allows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from deltatune.core import Adapter, DeltatuneError, adapters, using
from deltatune.core.units import ATTENTION
from deltatune.data import Encoded
from deltatune.data.encode import Example, Task
from deltatune.data.loader import Batches
from deltatune.data.packing import packed, padded
from deltatune.models.blocks import blockable
from deltatune.models.prompting import Prompt
from deltatune.train.memory import Shape
from deltatune.train.options import TOKENS_PER_STEP, TrainOptions
from deltatune.train.recipe import Data

LOOKED_AT = 500  # batches, for the largest
Packing = Literal["none", "rows", "blocks"]
"""A row for each document; rows of several; or one row of all, the layout of which the model is told."""


def batches(rows: Encoded, tokenizer: PreTrainedTokenizerBase, options: TrainOptions, task: Task, packing: Packing,
            max_length: int, seed: int, *, rank: int = 0, world: int = 1) -> Batches:  # fmt: skip
    """The rows of a run, as its options and the kind of packing have them."""
    longest = max_length if packing != "none" else max(map(len, rows))
    step = options.tokens_per_step or TOKENS_PER_STEP
    if packing != "none" and options.batch_size is None and (options.tokens_per_batch or step) < longest:
        longest = max(options.tokens_per_batch or step, max(map(len, rows)))  # a row need not be longer than a step
    size: dict[str, Any] = {**options.batching(longest, world)}
    return Batches(
        rows.examples, pad=tokenizer.pad_token_id or 0, task=task, packing=packing != "none",
        blocked=packing == "blocks", max_length=longest, group_by_length=packing == "none", seed=seed,
        rank=rank, world=world, **size,
    )  # fmt: skip


def largest(found: Batches) -> Shape:
    """The largest of the first batches of an epoch, in tokens and in tokens that carry loss."""
    rows = length = trained = target = 0
    blocks = None
    for _, batch in zip(range(LOOKED_AT), found.once(), strict=False):
        b, t = batch.inputs["input_ids"].shape
        if b * t > rows * length:
            rows, length, blocks = b, t, batch.blocks
        trained = max(trained, batch.trained_tokens)
        target = max(target, batch.labels.shape[-1] if batch.labels.ndim > 1 else 0)
    return Shape(rows, length, trained, found.task, target, blocks)


def wanted(data: Data, options: TrainOptions, task: Task) -> bool:
    """Rows that are counted stay apart unless asked otherwise: a packed row is not one of the file's."""
    usual = options.batch_size is None if data.packing is None else data.packing
    return usual and task == "causal"


def prompted(adapter: Adapter) -> bool:
    """Whether a prompt stands before its rows' tokens, which of packed documents the first alone would see."""
    prompts = [unit for _, unit in adapter.units() if isinstance(unit, Prompt)]
    return any(unit.prompt is not None or unit.source is not None for unit in prompts)


def packs(model: Any, may: bool, asked: bool | None, options: TrainOptions, longest: int) -> Packing:
    """How this model's documents share rows, the fastest way that it gets right: tried on the model itself, under the
    adapters that are at work.

    longest: tokens of the longest document."""
    if may and options.batch_size is None and blockable(model, longest):
        return "blocks"
    if may and apart(model):
        return "rows"
    if asked:
        with using(model) if adapters(model) else nullcontext():
            mixes = may and not apart(model)
        why = "the base lets packed rows see one another" if mixes else "the task or the method needs a row each"
        raise DeltatuneError(f"data.packing: true is not possible: {why}; leave it out")
    return "none"


@torch.no_grad()
def apart(model: Any) -> bool:
    """Whether documents in a packed row give the logits that each gives alone: whether the model tells them apart."""
    ids = [[3, 4, 5, 6, 7], [8, 9, 10], [6, 5, 4]]
    one, two, three = (Example(i, list(i)) for i in ids)
    training = model.training
    model.eval()
    for adapter in adapters(model).values():
        for _, _, unit, place in adapter.sites():
            unit.training = place == ATTENTION  # what it cuts a row into in training, documents lie across
    try:
        rows = packed([[one, two], [three, two, three]], 0).to(model.device)
        got = model(**rows.inputs).logits.float()[0, 5:8]
        alone = model(**padded([two], 0).to(model.device).inputs).logits.float()[0]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    exact = next(model.parameters()).dtype is torch.float32
    return bool((got - alone).abs().max() <= (1e-3 if exact else 5e-2) * alone.abs().max())
