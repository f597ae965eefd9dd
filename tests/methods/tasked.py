"""Models and trained tasks for the tests of multitask prompts."""

from __future__ import annotations

from typing import Any

import torch

import deltatune as dt
from deltatune.methods.multitask_prompt import Scaled
from deltatune.models.tiny import tiny

FAMILIES = ("llama", "gpt2", "bloom", "opt", "bert", "roberta", "t5", "bart")
DECODERS = ("llama", "gpt2", "bloom", "opt")
TASKS = ("squad", "mnli", "sst2")


def build(family: str = "llama", task: str = "lm") -> Any:
    torch.manual_seed(0)
    return tiny(family, task)


def factors(adapter: dt.Adapter) -> Scaled:
    return next(m for _, u in adapter.units() for m in u.modules() if isinstance(m, Scaled))


def sources(model: Any, r: int = 1, seed: int = 1) -> dt.Adapter:
    """An adapter of three tasks with factors of their own."""
    adapter = dt.attach(model, dt.MultitaskPrompt(length=4, r=r, tasks=TASKS), "sources")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g).to(p.dtype))
    return adapter


def near(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
