"""Exploring Universal Intrinsic Task Subspace via Prompt Tuning. Qin et al., 2021. arXiv:2110.07867

    P = W_3 tanh(W_2 z + b_2) + b_3,     P in R^{p d} flattened,  z in R^{d_I}

Intrinsic subspace tuning, the second of two stages: z alone is trained, P put where prompt tuning puts its prompt. The
decoder, W_2, W_3 and their biases, is frozen, and saved with z. It comes from the first stage, `IntrinsicSubspace`, by
`transfer` or the callback `Transfer`; until then it is random. With one of that stage's tasks named, z starts where the
encoder puts that task's prompt; else it is N(0, 0.02^2). In the end `flatten` leaves P alone, to go on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Intervention, Method, Site
from deltatune.methods.prompt import CrossMask, PromptTuning
from deltatune.models.prompting import Prompt
from deltatune.models.task_prompts import Made


@dataclass(frozen=True, kw_only=True)
class IntrinsicPrompt(Method):
    """`length` p; `dim` d_I; `hidden`, the width between W_2 and W_3."""

    lr: ClassVar[float] = 1e-1
    length: int = 20
    dim: int = 250
    hidden: int = 768

    usual = ("backbone", "decoder")
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [n for n in ("length", "dim", "hidden") if getattr(self, n) < 1]:
            raise DeltatuneError(f"{type(self).__name__}: {wrong[0]} must be at least 1, got {getattr(self, wrong[0])}")

    def flat(self) -> Method:
        return PromptTuning(targets=self.targets, length=self.length)

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        unit = PromptTuning(length=self.length).build(site, None)
        if isinstance(unit, CrossMask):
            return unit
        assert isinstance(unit, Prompt) and unit.prompt is not None
        return self.made(unit, unit.prompt.detach(), site)

    def made(self, unit: Prompt, start: Tensor, site: Site) -> Prompt:
        return Prompt(unit.at, Decoded(start.shape, self, site))


def decoder(method: IntrinsicPrompt, size: int, site: Site) -> nn.Sequential:
    up, out = nn.Linear(method.dim, method.hidden, **site.like), nn.Linear(method.hidden, size, **site.like)
    return nn.Sequential(up, nn.Tanh(), out)


class Decoded(Made):
    """`z` (d_I,) and the frozen `decoder`."""

    def __init__(self, shape: torch.Size, method: IntrinsicPrompt, site: Site) -> None:
        super().__init__()
        self.shape = shape
        self.z = nn.Parameter(0.02 * torch.randn(method.dim, **site.like))
        self.decoder = decoder(method, shape.numel(), site)
        for module in self.decoder:
            for name, p in list(module.named_parameters()):  # what is no parameter is not trained, and still saved
                delattr(module, name)
                module.register_buffer(name, p.detach())

    def made(self, i: int) -> Tensor:
        return self.decoder(self.z).view(self.shape)  # type: ignore[no-any-return]

    def transfer(self, source: Mapping[str, Tensor], task: int | None) -> None:
        """Take over the decoder of a subspace, and with a task its z."""
        for name, t in self.decoder.state_dict(prefix="decoder.").items():
            if (given := source[name]).shape != t.shape:
                raise DeltatuneError(
                    f"IntrinsicPrompt: {name} has shape {tuple(t.shape)}, its source {tuple(given.shape)}; give the "
                    "source's length, dim and hidden"
                )
            t.copy_(given)
        if task is not None:
            # of tensors that a file maps into memory unaligned, a product may be rounded otherwise
            w, b, p = (source[n].clone() for n in ("encoder.weight", "encoder.bias", "prompts"))
            self.z.copy_(F.linear(p[task].flatten(), w, b))
