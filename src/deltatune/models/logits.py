"""What a model does to its head's logits before it returns them: found out by giving it logits to treat.

Configurations name the same thing differently, and different things alike (Granite divides by its `logits_scaling`,
HyperCLOVA X multiplies by it), so their numbers only make candidates. A model that does anything else has no treatment
that is known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
_SHIFT = "final_logits_bias"  # BART and its kin: added to the logits, and no parameter


@dataclass(frozen=True)
class Treatment:
    """x -> cap tanh(scale x / cap), without a cap scale x; then plus the model's own constant if `shifted`."""

    scale: float = 1.0
    cap: float | None = None
    shifted: bool = False

    def __call__(self, x: Tensor, shift: Tensor | None) -> Tensor:
        x = x * self.scale
        x = x if self.cap is None else self.cap * torch.tanh(x / self.cap)
        return x if shift is None else x + shift.to(x.dtype)

    def shift(self, model: Any) -> Tensor | None:
        """(vocabulary,), or None."""
        return getattr(model, _SHIFT).flatten() if self.shifted else None


def candidates(model: Any) -> tuple[Treatment, ...]:
    """Treatments that the numbers in the configuration could mean."""
    if getattr(model, _SHIFT, None) is not None:
        return (Treatment(shifted=True),)
    config: Any = getattr(model, "config", None)
    configs = config, getattr(config, "text_config", None)
    caps = [number for config in configs for name in _CAPS if (number := _number(config, name))]
    scales = [number for config in configs for name in _SCALES if (number := _number(config, name))]
    scales += [1 / number for number in scales]
    every = product((1.0, *scales), (None, *caps))
    return tuple(dict.fromkeys(Treatment(scale, cap) for scale, cap in every))


def _number(config: Any, name: str) -> float | None:
    number: Any = getattr(config, name, None)
    return float(number) if type(number) in (int, float) and number > 0 else None


def probe(like: Tensor) -> Tensor:
    """Logits (1, 3, vocabulary) to be treated in place of `like` (..., vocabulary): none, small and large ones."""
    dtype, n = torch.promote_types(like.dtype, torch.float32), like.shape[-1]
    ramp = torch.linspace(-1, 1, n, dtype=dtype, device=like.device)
    return torch.stack([torch.zeros_like(ramp), 4 * ramp, -300 * ramp])[None]


def treatment(model: Any, given: Tensor, returned: Any) -> Treatment | None:
    """The candidate by which `model` made `returned` of the `given` probe, in every number; None if none did."""
    if not isinstance(returned, Tensor) or returned.shape != given.shape or not returned.is_floating_point():
        return None
    if given.is_meta:  # without numbers to tell them apart, the one that needs most memory
        return candidates(model)[-1]
    near = 8 * max(torch.finfo(returned.dtype).eps, torch.finfo(given.dtype).eps)
    best, least = None, near
    for one in candidates(model):
        want = one(given, one.shift(model))
        off = (returned - want).abs() / want.abs().clamp(min=torch.finfo(want.dtype).tiny)
        worst = float(off.max())  # NaN if anything is, and then not less than any number
        if worst < least:
            best, least = one, worst
    return best
