"""A training step with and without each trick, in turn, in one process, on the same documents.

    python benchmarks/pairs.py --data alpaca.json [--repeats 8]

Where a machine's speed moves by more than a trick is worth, runs of whole stacks one after the other do not show it;
steps a few seconds apart do. Steps are of about 2,048 tokens, forward, backward and AdamW; SmolLM2-135M-Instruct, LoRA
r=8 on all linear layers, fp32. Printed are the medians of both sides, and of the quotients of neighbouring steps with
their quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from contenders import LORA, MAX_LENGTH, TOKENS, base, nothing_shared, plain_linears, rows, whole

import deltatune as dt
from deltatune.data import Example, packing
from deltatune.data.packing import Batch
from deltatune.models.blocks import blocked
from deltatune.models.fused import fused
from deltatune.train.loss import outcome
from deltatune.train.memory import kept_freed

Micro = Callable[[list[Example]], list[Batch]]


def together(documents: list[Example]) -> list[Batch]:
    return [packing.blocked(documents)]


def apart(documents: list[Example]) -> list[Batch]:
    with nothing_shared():
        return together(documents)


def in_rows(documents: list[Example]) -> list[Batch]:
    return [packing.packed(_bins(documents, MAX_LENGTH), 0)]


def in_passes(documents: list[Example]) -> list[Batch]:
    return [packing.blocked(few) for few in _bins(documents, 768)]


def padded(documents: list[Example]) -> list[Batch]:
    """Four rows at a time, as they come."""
    return [packing.padded(documents[i : i + 4], 0) for i in range(0, len(documents), 4)]


def _bins(documents: list[Example], tokens: int) -> list[list[Example]]:
    return [[documents[i] for i in found] for found in packing.pack([len(d.input_ids) for d in documents], tokens, 0)]


@dataclass(frozen=True)
class Way:
    """How a step is done; as it stands, the way `fit` does it in one pass."""

    micro: Micro = together
    loss: Callable[..., Any] = outcome
    linears: Callable[[], AbstractContextManager[Any]] = nullcontext
    blocks: Callable[[Any], AbstractContextManager[Any]] = fused
    full: bool = False


PAIRS: dict[str, tuple[Way, Way]] = {
    "every weight trains, instead of LoRA": (Way(), Way(full=True)),
    "beginnings computed in each document": (Way(), Way(micro=apart)),
    "rows of 256 tokens, a mask": (Way(micro=apart), Way(micro=in_rows)),
    "padded rows, four a pass": (Way(), Way(micro=padded)),
    "passes of 768 tokens": (Way(), Way(micro=in_passes)),
    "logits of all positions": (Way(), Way(loss=whole)),
    "linears operation by operation": (Way(), Way(linears=plain_linears)),
    "norms and gates operation by operation": (Way(), Way(blocks=lambda model: nullcontext())),
    "all of these but LoRA": (Way(), Way(padded, whole, plain_linears, lambda model: nullcontext())),
}


class Steps:
    """Steps of LoRA's model, and of one whose weights all train, each with its optimizer."""

    def __init__(self) -> None:
        self.models = {full: base() for full in (False, True)}
        dt.attach(self.models[False], LORA)
        self.optimizers = {}
        for full, model in self.models.items():
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizers[full] = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def seconds(self, way: Way, documents: list[Example]) -> float:
        model, batches = self.models[way.full], way.micro(documents)
        with ExitStack() as stack:
            for context in (blocked(model), way.blocks(model), way.linears()):
                stack.enter_context(context)
            began = time.perf_counter()
            for batch in batches:
                way.loss(model, batch, "causal").total.backward()
            self.optimizers[way.full].step()
            took = time.perf_counter() - began
        self.optimizers[way.full].zero_grad(set_to_none=True)
        return took


def drawn(examples: list[Example], count: int) -> list[list[Example]]:
    """`count` times documents of `TOKENS` tokens together, about."""
    found: list[list[Example]] = [[]]
    for example in examples:
        if sum(len(e.input_ids) for e in found[-1]) + len(example.input_ids) > TOKENS:
            found.append([])
        found[-1].append(example)
    return [found[i % (len(found) - 1)] for i in range(count)]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", required=True, help="rows in alpaca's format")
    args.add_argument("--repeats", type=int, default=8)
    args.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    given = args.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    _, examples = rows(given.data)
    steps = Steps()
    heads = "instead of what `fit` does, in one pass", "s, as fit does", "s, instead", "quotient: median (quartiles)"
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    with kept_freed():
        for name in given.only:
            one, other = PAIRS[name]
            documents = drawn(examples, given.repeats + 1)
            for way in (one, other):
                steps.seconds(way, documents[-1])  # what is done for the first time
            times = []
            for i, each in enumerate(documents[:-1]):
                order = (one, other) if i % 2 else (other, one)
                took = {id(way): steps.seconds(way, each) for way in order}
                times.append((took[id(one)], took[id(other)]))
            low, middle, high = statistics.quantiles([b / a for a, b in times], n=4)
            sides = [statistics.median(side) for side in zip(*times, strict=True)]
            print(f"| {name} | {sides[0]:.2f} | {sides[1]:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
