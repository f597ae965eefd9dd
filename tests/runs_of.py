"""A whole run of a method through `fit`, in one piece and in two, which must agree bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.data import Batches, Example
from deltatune.models.tiny import tiny
from deltatune.train.loop import Interrupted, Result, fit
from deltatune.train.options import TrainOptions


def documents(n: int = 16, seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 99, (9,), generator=g).tolist() for _ in range(n)]
    return [Example(ids, [-100] * 2 + ids[2:], f"d.jsonl:{i + 1}") for i, ids in enumerate(rows)]


def run_on_llama(
    method: dt.core.Method, folder: Path, stop: int, steps: int = 8, **options: Any
) -> tuple[dt.Adapter, Result]:
    """The adapter and the result of a run that was interrupted after step `stop` and resumed."""
    _, whole, _ = _go(method, folder / "whole", steps, **options)
    with pytest.raises(Interrupted):
        _go(method, folder / "halves", steps, stop=stop, **options)
    _, adapter, result = _go(method, folder / "halves", steps, resume=True, **options)
    one, other = whole.state_dict(), adapter.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return adapter, result


def _go(method: dt.core.Method, output: Path, steps: int, resume: bool = False, stop: int = 0, **given: Any) -> Any:
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = dt.attach(model, method)
    usual = {"lr": 1e-2, "weight_decay": 0.1, "schedule": "constant"}
    options = TrainOptions(max_steps=steps, batch_size=4, eval_every=1, precision="fp32", **{**usual, **given})

    def report(record: dict[str, Any]) -> None:
        if record.get("step") == stop:
            signal.raise_signal(signal.SIGINT)

    batches = Batches(documents(), batch_size=4)
    held_out = Batches(documents(4, seed=9), batch_size=4)
    result = fit(model, adapter, batches, eval_batches=held_out, options=options, output=output, resume=resume,
                 report=report)  # fmt: skip
    return model, adapter, result
