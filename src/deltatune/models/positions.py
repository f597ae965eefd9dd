"""Position interpolation: RoPE at position p / factor, so that a longer context has the angles of the base's.

Extending Context Window of Large Language Models via Positional Interpolation. Chen et al. 2023. arXiv:2306.15595.
transformers has the same as RoPE of the type "linear", which divides the frequencies: (p / f) w = p (w / f).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention


def rotates(path: str, module: nn.Module) -> bool:
    """Whether this module makes the angles of RoPE."""
    return "inv_freq" in module._buffers


class Interpolated(Intervention):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, call: Base, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(x, position_ids / self.factor, *args, **kwargs)

    def merged(self, module: nn.Module) -> Mapping[str, Any]:
        if self.factor == 1:
            return {}
        config: Any = getattr(module, "config", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if (kind := rope.get("rope_type")) not in ("default", "linear"):
            raise DeltatuneError(
                f"positions divided by {self.factor} beside RoPE of the type {kind!r} are no type that a configuration "
                "can name, and cannot be merged"
            )
        return {
            "inv_freq": module.get_buffer("inv_freq") / self.factor,
            "config.rope_parameters": {**rope, "rope_type": "linear", "factor": rope.get("factor", 1.0) * self.factor},
            "config.max_position_embeddings": config.max_position_embeddings * self.factor,
        }
