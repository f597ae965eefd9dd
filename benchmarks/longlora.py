"""What a training step of LongLoRA costs as its rows grow, against the same parameters trained under full attention.

    python benchmarks/longlora.py [--lengths 512 1024 2048 4096] [--repeats 3] [--layers 30]

SmolLM2-135M-Instruct without its head, one row of random tokens a step, forward and backward; the two in turn, in one
process; medians. Attention alone grows with the square of the length, and only that can differ.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import deltatune as dt
from deltatune.models.default import default_base
from deltatune.models.fused import fused

GROUPS = 4
FULL = dt.Union(methods=(dt.LoRA(targets=dt.Part("q", "k", "v", "o")), dt.Tune(targets=dt.Part("embedding", "norm"))))


def model(method: dt.Method, layers: int) -> Any:
    base = AutoModelForCausalLM.from_pretrained(default_base(), num_hidden_layers=layers, dtype=torch.float32)
    dt.attach(base, method)
    return base.train()


def seconds(base: Any, tokens: torch.Tensor) -> float:
    began = time.perf_counter()
    hidden = base.model(tokens, use_cache=False).last_hidden_state
    hidden.square().mean().backward()
    return time.perf_counter() - began


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--layers", type=int, default=30)
    given = args.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"torch {torch.__version__}, transformers {version('transformers')}, {given.layers} blocks\n")
    print(f"| tokens | full attention | LongLoRA, {GROUPS} groups | ratio |\n|---|---|---|---|")
    sides = [model(FULL, given.layers), model(dt.LongLoRA(groups=GROUPS), given.layers)]
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(fused(side))
        for n in given.lengths:
            tokens = torch.randint(10, 40_000, (1, n), generator=torch.Generator().manual_seed(n))
            found = [[seconds(side, tokens) for side in sides] for _ in range(given.repeats)]
            full, ours = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {n} | {full:.1f} s | {ours:.1f} s | {ours / full:.2f} |", flush=True)


if __name__ == "__main__":
    main()
