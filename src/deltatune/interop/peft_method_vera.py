"""PEFT's VeraConfig as a method: the projections are those that PEFT draws, and are saved with the adapter."""

from __future__ import annotations

import torch
from torch import nn

from deltatune.core import Adapter, DeltatuneError, Method
from deltatune.interop.peft_config import VeraConfig
from deltatune.interop.peft_format_vera import drawn
from deltatune.interop.peft_targets import VERA, targeted, targets_of
from deltatune.methods.vera import Projections, VeRA
from deltatune.storage import layers


def vera(model: nn.Module, config: VeraConfig) -> Method:
    if not config.init_weights:
        raise DeltatuneError("VeraConfig.init_weights=False is not offered; leave it out")
    targets, _ = targets_of(model, config, VERA)
    for path, module in targeted(model, config):
        if not layers.is_linear(module):
            kind = layers.plain_class(type(module)).__name__
            raise DeltatuneError(f"VeraConfig: target {path!r} is a {kind}; PEFT's VeRA is of linear layers alone")
    return VeRA(
        targets=targets, r=config.r, d_initial=config.d_initial, dropout=config.vera_dropout, save_projection=True
    )


@torch.no_grad()
def start_vera(adapter: Adapter, config: VeraConfig) -> None:
    for pair in adapter.record.shared.values():
        if isinstance(pair, Projections):
            a, b = drawn(config.projection_prng_key, config.r, len(pair.b), pair.a.shape[1])
            pair.a.copy_(a)
            pair.b.copy_(b)
