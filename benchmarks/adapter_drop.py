"""What dropping the adapters of the lowest n blocks saves: at inference, under one adapter and several, in training.

    python benchmarks/adapter_drop.py [--dropped 0 5 10 15 20 25] [--size 48] [--repeats 5] [--tasks 8]

SmolLM2-135M-Instruct under Pfeiffer adapters, 8 rows of 64 random tokens, fp32; the variants in turn, in one process;
medians, and ratios to n = 0. A training step is a forward and a backward pass. Several adapters answer for the same
rows, and what is below all of them is run once.
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
from deltatune.serve import under_each


def one(model: Any, tokens: torch.Tensor, names: list[str]) -> None:
    with torch.no_grad():
        model(tokens, use_cache=False)


def several(model: Any, tokens: torch.Tensor, names: list[str]) -> None:
    under_each(model, names, input_ids=tokens, use_cache=False)


def step(model: Any, tokens: torch.Tensor, names: list[str]) -> None:
    model(tokens, use_cache=False).last_hidden_state.square().mean().backward()


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--dropped", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25])
    args.add_argument("--size", type=int, default=48)
    args.add_argument("--repeats", type=int, default=5)
    args.add_argument("--tasks", type=int, default=8)
    given = args.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = torch.randint(10, 40_000, (8, 64), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(default_base(), dtype=torch.float32).model.eval()
    names = {n: [f"n{n} task {t}" for t in range(given.tasks)] for n in given.dropped}
    for n, mine in names.items():
        for name in mine:
            dt.attach(model, dt.AdapterDrop(inner=dt.Pfeiffer(size=given.size), n=n), name)
    times: dict[tuple[int | str, Any], list[float]] = {}
    for i in range(given.repeats + 1):  # the first is not counted
        for n in (*names, "base"):
            mine = names.get(n, [])
            dt.activate(model, *mine[:1])
            for run in (one, several, step) if mine else (one,):
                began = time.perf_counter()
                run(model, tokens, mine)
                if i:
                    times.setdefault((n, run), []).append(time.perf_counter() - began)
    print(f"torch {torch.__version__}, transformers {version('transformers')}, Pfeiffer of {given.size}\n")
    heads = ["blocks without adapters", "one adapter", f"{given.tasks} adapters, same rows", "training step"]
    print(f"| {heads[0]} | {' | '.join(f'{head} | / n = 0' for head in heads[1:])} |\n|{'---|' * 7}")
    for n in (*names, "base"):
        cells = [str(n)]
        for run in (one, several, step):
            if (n, run) in times:
                took, whole = statistics.median(times[n, run]), statistics.median(times[given.dropped[0], run])
                cells += [f"{1e3 * took:.0f} ms", f"{took / whole:.2f}"]
            else:
                cells += ["", ""]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
