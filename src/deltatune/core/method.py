"""Values that describe an adapter before it touches a model: `Method`, `Union`, `Init`, and `Site`, which they get."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.callback import Callback
from deltatune.core.config import Config
from deltatune.core.select import Select
from deltatune.core.units import ATTENTION, CALL, Intervention
from deltatune.storage import layers


def matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that is, or ends, a module's path."""
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", path)), default)


@dataclass(frozen=True)
class Shape:
    """What a unit must know to allocate its parameters."""

    out: int
    in_: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def like(self) -> dict[str, Any]:
        """Keyword arguments for a tensor factory: the adapter's precision and place."""
        return {"dtype": self.dtype, "device": self.device}


@dataclass(frozen=True)
class Site:
    """One place an adapter touches: a module by its path, and `at`, the parameter a delta replaces, or the place
    ("call", "attention") an intervention surrounds. `rows` of a fused projection are a site of their own."""

    model: nn.Module
    path: str
    module: nn.Module
    at: str = "weight"
    rows: Tensor | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def weight(self) -> Tensor:
        """The base's parameter, (out, in), detached."""
        w = layers.read(self.module, "weight" if self.at in (CALL, ATTENTION) else self.at).detach()
        return (w if self.rows is None else w[self.rows.to(w.device)]).to(self.device)

    @property
    def shape(self) -> Shape:
        w = self.weight
        return Shape(w.shape[0], w.shape[1] if w.ndim > 1 else 1, self.dtype, self.device)

    @property
    def like(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return getattr(self.module, "config", None) or getattr(self.model, "config", None)


@dataclass(frozen=True, kw_only=True)
class Init(Config):
    """HOW it starts: fills the factors of a low-rank delta, given the base weight (out, in)."""

    def __call__(self, delta: Any, w: Tensor) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Method(Config):
    """A configuration that builds one unit per site: the whole public API of a method."""

    targets: Select = None

    usual: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")  # parts that `targets=None` means
    at: ClassVar[tuple[str, ...]] = ("weight",)  # parameters a delta replaces, or ("call",), or ("attention",)

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        """State that all sites of one adapter share (VeRA's A and B, a vector bank, a gate network)."""
        return None

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        raise NotImplementedError

    def callbacks(self) -> Iterable[Callback]:
        """What training this method needs beside its loss."""
        return ()

    def parts(self) -> Sequence[Method]:
        return (self,)


@dataclass(frozen=True, kw_only=True)
class Union(Method):
    """Several methods under one name: MAM, UniPELT, LongLoRA, LoRA plus a trained head."""

    methods: tuple[Method, ...] = ()

    def parts(self) -> Sequence[Method]:
        return [p for m in self.methods for p in m.parts()]

    def callbacks(self) -> Iterable[Callback]:
        return [c for m in self.methods for c in m.callbacks()]
