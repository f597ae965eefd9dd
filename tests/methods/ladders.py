"""Backbones and what their ladders have, for the tests of ladder side-tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.ladder import Ladder
from deltatune.models.tiny import tiny

CAUSAL = (
    "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gptj", "opt", "bloom", "falcon",
    "falcon-new",
)  # fmt: skip
ENCODERS, SEQ2SEQ = ("bert", "roberta", "distilbert"), ("t5", "mt5", "bart")


def build(family: str, task: str = "lm", **overrides: Any) -> Any:
    torch.manual_seed(0)
    window = {"sliding_window": 4} if family in ("mistral", "gemma2", "gemma3") else {}  # shorter than the inputs
    return tiny(family, task, **window, **overrides)


def ladders(adapter: dt.Adapter) -> list[tuple[str, Any, Ladder]]:
    return [(path, module, u) for path, module, u, _ in adapter.sites() if isinstance(u, Ladder)]


def perturb(adapter: dt.Adapter, seed: int = 1, size: float = 0.05) -> dt.Adapter:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p) * size)
    return adapter


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def hooked(modules: dict[str, nn.Module], before: bool = False) -> tuple[dict[str, Tensor], list[Any]]:
    """What comes out of (or goes into) the modules, as they are called."""
    seen: dict[str, Tensor] = {}

    def after(name: str) -> Any:
        return lambda m, i, o: seen.__setitem__(name, o[0] if isinstance(o, tuple) else o)

    def ahead(name: str) -> Any:
        return lambda m, i: seen.__setitem__(name, i[0])

    return seen, [m.register_forward_pre_hook(ahead(n)) if before else m.register_forward_hook(after(n))
                  for n, m in modules.items()]  # fmt: skip
