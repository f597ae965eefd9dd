"""What a module call costs beyond its arithmetic: tiny linears, so that Python is all there is to time.

    python benchmarks/overhead.py

One thread, one row; microseconds a call of an adapted linear, forward and backward, and without gradients: the plain
module, deltatune, PEFT. The least of many repeats, the three in turn.
"""

from __future__ import annotations

import time
from importlib.metadata import version

import peft
import torch
from torch import nn

import deltatune as dt

LAYERS, REPEATS = 50, 200


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(LAYERS)])


def microseconds(model: nn.Module, trains: bool) -> float:
    x = torch.ones(1, 4, requires_grad=trains)
    model.train(trains)
    began = time.perf_counter()
    if trains:
        model(x).sum().backward()
    else:
        with torch.no_grad():
            model(x)
    return (time.perf_counter() - began) / LAYERS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    ours, wrapped = net(), net()
    dt.attach(ours, dt.LoRA(r=2, targets=r"\d+"))
    config = peft.LoraConfig(r=2, target_modules=[str(i) for i in range(LAYERS)])
    theirs = peft.get_peft_model(wrapped, config)
    stacks = {"plain linear, frozen": net().requires_grad_(False), "deltatune": ours, "PEFT": theirs.base_model.model}
    print(f"torch {torch.__version__}, peft {version('peft')}\n\n| | forward and backward | inference |\n|---|---|---|")
    times: dict[str, list[list[float]]] = {name: [[], []] for name in stacks}
    for _ in range(REPEATS):
        for name, model in stacks.items():
            times[name][0].append(microseconds(model, True))
            times[name][1].append(microseconds(model, False))
    for name, (training, inference) in times.items():
        print(f"| {name} | {min(training):.0f} us | {min(inference):.0f} us |")


if __name__ == "__main__":
    main()
