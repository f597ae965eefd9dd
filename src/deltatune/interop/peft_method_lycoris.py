"""PEFT's LoHaConfig and LoKrConfig as methods, and where PEFT starts them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.init import kaiming_uniform_

from deltatune.core import Adapter, DeltatuneError, Method, Union
from deltatune.core.method import matching
from deltatune.interop.peft_config import LoHaConfig, LoKrConfig
from deltatune.interop.peft_format_lycoris import adaptable, refuse_split, sides
from deltatune.interop.peft_targets import LORA, exactly, refuse, targeted, targets_of
from deltatune.methods.loha import HadamardProduct, LoHa
from deltatune.methods.lokr import LoKr, Product
from deltatune.storage import layers


def loha(model: nn.Module, config: LoHaConfig) -> Method:
    return _by_rank(model, config, lambda **options: LoHa(**options))


def lokr(model: nn.Module, config: LoKrConfig) -> Method:
    refuse(config, "rank_dropout_scale")
    decompose = ("w1", "w2") if config.decompose_both else ("w2",)
    factor = config.decompose_factor if config.decompose_factor != 0 else 1
    method = _by_rank(model, config, lambda **options: LoKr(factor=factor, decompose=decompose, **options))
    for path, module in targeted(model, config):
        refuse_split(path, module, config.decompose_factor)
    return method


def _by_rank(model: nn.Module, config: Any, build: Callable[..., Method]) -> Method:
    """One method, or a union of one for each rank and alpha."""
    refuse(config, "rank_dropout", "module_dropout")
    targets, _ = targets_of(model, config, LORA)
    kind = type(config).__name__.removesuffix("Config")
    found: dict[tuple[int, float], list[str]] = {}
    for path, module in targeted(model, config):
        if not adaptable(module):
            name = layers.plain_class(type(module)).__name__
            what = f"PEFT's {kind} has no such layer; leave it out, or attach deltatune.{kind}"
            raise DeltatuneError(f"{kind}Config: target {path!r} is a {name}, and {what}")
        if config.use_effective_conv2d and sides(module)[2] > 1:
            what = "is not offered for a kernel of more than one place; leave it out"
            raise DeltatuneError(f"{kind}Config.use_effective_conv2d=True: {path!r}: {what}")
        r = matching(config.rank_pattern or {}, path, config.r)
        found.setdefault((r, matching(config.alpha_pattern or {}, path, config.alpha)), []).append(path)
    made = [
        build(targets=targets if len(found) == 1 else exactly(paths), r=r, alpha=alpha)
        for (r, alpha), paths in found.items()
    ]
    return made[0] if len(made) == 1 else Union(methods=tuple(made))


def _begin(adapter: Adapter, cls: type[nn.Module], zero: tuple[str, ...]) -> None:
    """Kaiming-uniform factors, but those in `zero`."""
    for p, name in _factors(adapter, cls):
        if name in zero:
            p.zero_()
        else:
            kaiming_uniform_(p, a=math.sqrt(5))


def _factors(adapter: Adapter, cls: type[nn.Module]) -> Iterator[tuple[nn.Parameter, str]]:
    for _, unit in adapter.units():
        if isinstance(unit, cls):
            yield from ((p, name) for name, p in unit.named_parameters())


@torch.no_grad()
def start_loha(adapter: Adapter, config: LoHaConfig) -> None:
    _begin(adapter, HadamardProduct, ("w2_b",) if config.init_weights else ())


@torch.no_grad()
def start_lokr(adapter: Adapter, config: LoKrConfig) -> None:
    zero = {"lycoris": ("w2", "w2_b"), True: ("w1", "w1_a"), False: ()}[config.init_weights]
    _begin(adapter, Product, zero)
