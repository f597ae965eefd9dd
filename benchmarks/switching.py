"""Switching between adapters and loading one more, as their number grows: deltatune and PEFT, in turn, in one process.

    python benchmarks/switching.py [--adapters 1 8 32 1000] [--most 32] [--hidden 256 --layers 12]

Prints medians of five repeats and the ratio. The base is a random Llama built in code. PEFT is given no more than
`--most` adapters: each one it loads takes longer than the last.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt

REPEATS = 5


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def base(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": 1024}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **sizes)).eval()


def main() -> None:
    torch.set_num_threads(1)
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32, 1000])
    args.add_argument("--most", type=int, default=32)
    args.add_argument("--hidden", type=int, default=256)
    args.add_argument("--layers", type=int, default=12)
    given = args.parse_args()
    warnings.filterwarnings("ignore")
    print(", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft)), platform.processor())
    ours, plain = base(given.hidden, given.layers), base(given.hidden, given.layers)
    with tempfile.TemporaryDirectory() as folder:
        dt.attach(ours, dt.LoRA(r=8), "first").save(folder)
        dt.detach(ours)
        other = peft.PeftModel.from_pretrained(plain, folder, adapter_name="a0")
        dt.load(ours, folder, "a0")
        print("| adapters | load one more: ours | PEFT | ratio | activate: ours | PEFT | ratio |")
        print("|---|---|---|---|---|---|---|")
        count = 1
        for target in given.adapters:
            while count < target:
                dt.load(ours, folder, f"a{count}")
                if count < given.most:
                    other.load_adapter(folder, f"a{count}")
                count += 1
            theirs = other if target <= given.most else None
            load, switch = _load(ours, theirs, folder), _switch(ours, theirs, count)
            cells = [
                f"{1e3 * a:.3f} ms | {f'{1e3 * b:.1f} ms | {b / a:.0f}x' if b else ' | '}" for a, b in (load, switch)
            ]
            print(f"| {count} | {' | '.join(cells)} |", flush=True)


Times = tuple[float, float | None]


def _medians(times: list[tuple[float, float | None]]) -> Times:
    theirs = [b for _, b in times if b is not None]
    return statistics.median(a for a, _ in times), statistics.median(theirs) if theirs else None


def _load(ours: torch.nn.Module, other: peft.PeftModel | None, folder: str | Path) -> Times:
    times: list[Times] = []
    for i in range(REPEATS):
        a = timed(lambda i=i: dt.load(ours, folder, f"more{i}"))
        b = None if other is None else timed(lambda i=i: other.load_adapter(str(folder), f"more{i}"))
        times.append((a, b))
        dt.detach(ours, f"more{i}")
        if other is not None:
            other.delete_adapter(f"more{i}")
    return _medians(times)


def _switch(ours: torch.nn.Module, other: peft.PeftModel | None, count: int) -> Times:
    names = [f"a{i * 7 % count}" for i in range(REPEATS)]
    return _medians([(timed(lambda n=n: dt.activate(ours, n)),
                      None if other is None else timed(lambda n=n: other.set_adapter(n))) for n in names])  # fmt: skip


if __name__ == "__main__":
    main()
