"""A small run that tests share: documents of counting tokens, a tiny Llama, a LoRA with dropout, packed batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from deltatune.core import Adapter, attach
from deltatune.data import Batches, Example
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny
from deltatune.train.loop import Result, fit
from deltatune.train.options import TrainOptions


def documents(n: int = 40, seed: int = 0, longest: int = 20) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length, start = (int(torch.randint(low, high, (), generator=g)) for low, high in ((5, longest + 1), (3, 90)))
        ids = [3 + (start + j) % 96 for j in range(length)]
        found.append(Example(ids, [-100] * 3 + ids[3:], f"d.jsonl:{i + 1}"))
    return found


def model_and_adapter(family: str = "llama", **lora: Any) -> tuple[Any, Adapter]:
    torch.manual_seed(0)
    model = tiny(family)
    return model, attach(model, LoRA(**{"r": 4, **lora}))


def packed_batches(seed: int = 0) -> Batches:
    return Batches(documents(), packing=True, max_length=32, tokens_per_batch=64, seed=seed)


def whole_run(output: Path | None, steps: int = 24, resume: bool = False, report: Any = None, callbacks: Any = (),
              **options: Any) -> tuple[Any, Adapter, Result]:  # fmt: skip
    model, adapter = model_and_adapter(dropout=0.1)
    chosen = {"max_steps": steps, "lr": 5e-3, "tokens_per_step": 128, "eval_every": 6, "save_every": 5} | options
    if output is None:
        chosen.pop("save_every")
    result = fit(
        model, adapter, packed_batches(), eval_batches=Batches(documents(6, seed=9), batch_size=3),
        options=TrainOptions(**chosen), output=output, resume=resume, report=report, callbacks=callbacks,
    )  # fmt: skip
    return model, adapter, result


def losses(output: Path) -> list[tuple[Any, ...]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [tuple(r.get(k) for k in ("step", "loss", "grad_norm", "lr", "eval_loss")) for r in lines]


if __name__ == "__main__":  # a run to be killed: folder, threads
    torch.set_num_threads(int(sys.argv[2]))
    whole_run(Path(sys.argv[1]), report=lambda record: print(record.get("step", ""), flush=True))
