"""What dropping the adapters of the lowest n blocks saves, at inference and in training.

    python benchmarks/adapter_drop.py [--dropped 0 5 10 15 20 25] [--size 48] [--repeats 5]

SmolLM2-135M-Instruct under Pfeiffer adapters, 8 rows of 64 random tokens, fp32; the variants in turn, in one process;
medians, and ratios to n = 0. A training step is a forward and a backward pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import deltatune as dt
from deltatune.models.default import default_base


def forward(model: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        model(tokens, use_cache=False)


def step(model: Any, tokens: torch.Tensor) -> None:
    model(tokens, use_cache=False).last_hidden_state.square().mean().backward()


def seconds(run: Any, model: Any, tokens: torch.Tensor) -> float:
    began = time.perf_counter()
    run(model, tokens)
    return time.perf_counter() - began


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--dropped", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25])
    args.add_argument("--size", type=int, default=48)
    args.add_argument("--repeats", type=int, default=5)
    given = args.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = torch.randint(10, 40_000, (8, 64), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(default_base(), dtype=torch.float32).model
    for n in given.dropped:
        dt.attach(model, dt.AdapterDrop(inner=dt.Pfeiffer(size=given.size), n=n), f"n{n}")
    times: dict[tuple[int | str, str], list[float]] = {}
    for i in range(given.repeats + 1):  # the first is not counted
        for n in (*given.dropped, "base"):
            dt.activate(model, *([] if n == "base" else [f"n{n}"]))
            for run in (forward, step) if n != "base" else (forward,):
                found = seconds(run, model, tokens)
                if i:
                    times.setdefault((n, run.__name__), []).append(found)
    print(f"torch {torch.__version__}, transformers {version('transformers')}, Pfeiffer of {given.size}\n")
    print("| blocks without adapters | inference | / n = 0 | training step | / n = 0 |\n|---|---|---|---|---|")
    first = given.dropped[0]
    for n in (*given.dropped, "base"):
        cells = [str(n)]
        for kind in ("forward", "step"):
            if (n, kind) in times:
                one, whole = statistics.median(times[n, kind]), statistics.median(times[first, kind])
                cells += [f"{1e3 * one:.0f} ms", f"{one / whole:.2f}"]
            else:
                cells += ["", ""]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
