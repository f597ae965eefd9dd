"""The same run twice, with every trick and with none: the losses, step by step, and a picture of both.

    python benchmarks/curves.py --data alpaca.json [--steps 100] [--picture benchmarks/curves.png]

SmolLM2-135M-Instruct, LoRA r=8, fp32: the same examples in each step, in one row of blocks by fused kernels, or padded
and operation by operation. What differs is rounding; printed is the largest relative difference of a step's loss.
"""

from __future__ import annotations

import argparse
import os
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from contenders import LORA, LR, base, plain_blocks, plain_linears, rows, whole_logits

import deltatune as dt
from deltatune.data import Batches, packing
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions

MAX_LENGTH, TOKENS = 128, 160


def losses(data: str, steps: int, fast: bool) -> list[float]:
    tokenizer, examples = rows(data, MAX_LENGTH)
    torch.manual_seed(0)
    model = base()
    adapter = dt.attach(model, LORA)
    batches = Batches(examples, tokens_per_batch=TOKENS, packing=True, blocked=True, max_length=MAX_LENGTH)
    told = TrainOptions(tokens_per_step=TOKENS, tokens_per_batch=TOKENS, max_steps=steps, lr=LR, precision="fp32")

    def apart(plan: list[list[int]]) -> packing.Batch:
        return packing.padded([examples[i] for row in plan for i in row], tokenizer.pad_token_id or 0)

    with ExitStack() as stack:
        if not fast:
            stack.enter_context(mock.patch.object(batches, "_collate", apart))
            stack.enter_context(mock.patch("deltatune.train.loop.blocked", lambda model: nullcontext()))
            for trick in (plain_linears, whole_logits, plain_blocks):
                stack.enter_context(trick())
        return [record["loss"] for record in fit(model, adapter, batches, options=told).history]


def draw(fast: list[float], plain: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(2, 1), layout="constrained")
    steps = range(1, len(fast) + 1)
    above.plot(steps, plain, lw=3, alpha=0.4, label="plain")
    above.plot(steps, fast, lw=1, label="fast")
    above.set_ylabel("loss")
    above.legend()
    below.semilogy(steps, [max(abs(a / b - 1), 1e-9) for a, b in zip(fast, plain, strict=True)])
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    figure.savefig(path, dpi=110)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", required=True, help="rows in alpaca's format")
    args.add_argument("--steps", type=int, default=100)
    args.add_argument("--picture", type=Path, default=Path(__file__).with_name("curves.png"))
    given: Any = args.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(os.cpu_count() or 1)
    fast, plain = (losses(given.data, given.steps, kind) for kind in (True, False))
    draw(fast, plain, given.picture)
    worst = max(abs(a / b - 1) for a, b in zip(fast, plain, strict=True))
    print(f"{given.steps} steps of {TOKENS} tokens: loss {fast[0]:.4f} to {fast[-1]:.4f} (fast), {plain[0]:.4f} to "
          f"{plain[-1]:.4f} (plain); largest relative difference of a step {worst:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
