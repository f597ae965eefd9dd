"""What could still be saved in a training step by tricks that are not in it: each part, timed alone, over a whole step.

    python benchmarks/shares.py [--tokens 2048] [--repeats 20]

SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, fp32; medians. The step is a forward and backward pass of rows of
256 tokens; `siblings` are the products of q, k, v and of gate, up with their A: one after the other, or one of all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import deltatune as dt
from deltatune.models.default import default_base
from deltatune.models.fused import fused

R, LENGTH = 8, 256


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--tokens", type=int, default=2048)
    args.add_argument("--repeats", type=int, default=20)
    given = args.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(default_base(), dtype=torch.float32)
    adapter = dt.attach(model, dt.LoRA(r=R))
    parameters = list(adapter.parameters())
    ids = torch.randint(10, 40_000, (given.tokens // LENGTH, LENGTH))
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers

    def step() -> None:
        model.model(ids, use_cache=False).last_hidden_state.square().mean().backward()

    with fused(model):
        whole = milliseconds(step, 3)
    apart = torch.optim.AdamW(parameters, fused=True)
    flat = torch.zeros(sum(p.numel() for p in parameters), requires_grad=True)
    flat.grad = torch.ones_like(flat)
    one = torch.optim.AdamW([flat], fused=True)
    x, a = torch.randn(given.tokens, width), [torch.randn(R, width) for _ in range(5)]
    many, together = torch.cat(a[:3]), torch.cat(a[3:])

    def separate() -> None:
        for _ in range(blocks):
            for each in a:
                x @ each.T

    def joined() -> None:
        for _ in range(blocks):
            x @ many.T, x @ together.T

    parts: dict[str, Callable[[], Any]] = {
        "AdamW, fused, a tensor each": apart.step,
        "AdamW, fused, one flat buffer": one.step,
        "norm of all gradients": lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters]),
        "embedding of the tokens": lambda: model.get_input_embeddings()(ids),
        "siblings, one product each": separate,
        "siblings, one product of all": joined,
    }
    print(f"| part | ms | of a step of {given.tokens} tokens |\n|---|---|---|\n| the step | {whole:.0f} | |")
    for name, run in parts.items():
        with torch.no_grad():
            took = milliseconds(run, given.repeats)
        print(f"| {name} | {took:.1f} | {took / whole:.2%} |")


if __name__ == "__main__":
    main()
