"""Where the time of a training step goes, and how fast its products alone would be.

    python benchmarks/parts.py --data alpaca.json [--steps 3] [--micro 768]

LoRA r=8 on SmolLM2-135M-Instruct as `contenders.py` trains it. Printed are the seconds of a step by part, as torch's
profiler tells them, and the tokens/s that the products with the base's weights, of the head and of attention allow:
every one of them is run again by itself, at its shapes, twice, and the faster counts.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections import Counter
from typing import Any

import torch
from contenders import TOKENS, Clock, R, gemm, ours, rows
from torch.profiler import ProfilerActivity, profile

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}
BASE, FACTORS, HEAD, ATTENTION, REST = (
    "products with the base's weights", "products with the factors", "the head and its loss", "attention",
    "everything else",
)  # fmt: skip


class Profiled(Clock):
    """Profiles the steps after the first two, so many of them."""

    def __init__(self, steps: int) -> None:
        super().__init__(0)
        self.wanted, self.seen = steps, 0
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def step(self, tokens: int) -> bool:
        super().step(tokens)
        self.seen += 1
        if self.seen == 2:
            self.tokens, self.elapsed, self.began = 0, 0.0, time.perf_counter()
            self.profile.start()
        if self.seen < 2 + self.wanted:
            return False
        self.profile.stop()
        return True


def part(event: Any, vocabulary: int) -> str:
    """Which part of a step an operation belongs to, by its name and shapes."""
    sizes = {n for shape in event.input_shapes for n in shape}
    if vocabulary in sizes:
        return HEAD
    if event.key in PRODUCTS:
        return FACTORS if sizes & {R, 4 * R} else ATTENTION if "bmm" in event.key else BASE
    return ATTENTION if "softmax" in event.key else REST


def alone(event: Any) -> float:
    """Seconds of one product of these shapes by itself."""
    matrices = [torch.randn(shape) for shape in event.input_shapes if len(shape) >= 2][-2:]
    run, best = (torch.bmm if matrices[0].ndim == 3 else torch.mm), float("inf")
    for _ in range(3):
        began = time.perf_counter()
        run(*matrices)
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", required=True)
    args.add_argument("--steps", type=int, default=3)
    args.add_argument("--micro", type=int, default=TOKENS)
    given = args.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer, examples = rows(given.data)
    clock = Profiled(given.steps)
    ours(examples, tokenizer, clock, micro=given.micro)
    events = [e for e in clock.profile.key_averages(group_by_input_shape=True) if e.self_cpu_time_total]
    vocabulary, seconds, needed = len(tokenizer), Counter[str](), 0.0
    for event in events:
        where = part(event, vocabulary)
        seconds[where] += event.self_cpu_time_total / 1e6
        if event.key in PRODUCTS and where != FACTORS:
            needed += event.count * alone(event)
    whole = sum(seconds.values())
    print(f"| part | seconds a step | share |\n|---|---|---|\n| all | {whole / given.steps:.2f} | |")
    for name in (BASE, FACTORS, HEAD, ATTENTION, REST):
        print(f"| {name} | {seconds[name] / given.steps:.2f} | {seconds[name] / whole:.0%} |")
    print(f"\n{clock.tokens / clock.elapsed:.0f} tokens/s under the profiler, {gemm():.0f} GF/s now; the products")
    print(f"alone, but for the factors', {needed / given.steps:.2f} s a step: {clock.tokens / needed:.0f} tokens/s")


if __name__ == "__main__":
    main()
