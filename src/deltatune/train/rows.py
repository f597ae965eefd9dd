"""The rows that a recipe's `data` and its inits name, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from deltatune.core import Method
from deltatune.core.start import Start
from deltatune.data import Dataset, Encoded, build, load, split
from deltatune.data.encode import Task
from deltatune.train.recipe import Data


def encode(source: Dataset, tokenizer: PreTrainedTokenizerBase, data: Data, task: Task, max_length: int,
           label_names: Sequence[str] | None = None) -> Encoded:  # fmt: skip
    return build(source, tokenizer, task=task, template=data.template, max_length=max_length, too_long=data.too_long,
                 train_on=data.train_on, label_names=label_names)  # fmt: skip


def held(rows: Encoded, data: Data, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, seed: int
         ) -> tuple[Encoded, Encoded | None]:  # fmt: skip
    """(rows to train on, rows held out): a part of them, or another file."""
    if data.eval is None:
        return rows, None
    if isinstance(data.eval, int) or data.eval.endswith("%"):
        kept, out = split(rows.examples, data.eval, seed)
        return replace(rows, examples=kept), replace(rows, examples=out)
    return rows, other(data.eval, rows, data, tokenizer, task, max_length)


def started_from(method: Method | None, rows: Encoded, data: Data, tokenizer: PreTrainedTokenizerBase, task: Task,
                 max_length: int) -> dict[str, Encoded]:  # fmt: skip
    """What the inits of `method` name to start from in place of the training data, by that name."""
    inits = [c.init for c in method.callbacks() if isinstance(c, Start)] if method is not None else []
    names = dict.fromkeys(init.data for init in inits if init.data is not None)
    return {name: other(name, rows, data, tokenizer, task, max_length) for name in names}


def other(name: str, rows: Encoded, data: Data, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int
          ) -> Encoded:  # fmt: skip
    """A file, `datasets` folder or hub name, read as `rows` were."""
    source = load(name, format=data.format, columns=data.columns)
    return encode(source, tokenizer, data, task, max_length, rows.label_names)
