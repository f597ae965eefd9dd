"""VeRA in PEFT's layout: `vera_lambda_b` and `vera_lambda_d` are our b and d, and the adapter's one pair of projections
is `vera_A` (r, in) and `vera_B` (out, r), of the largest in and out that any module has.

Without `save_projection` PEFT leaves the pair out and draws it again from `projection_prng_key`, by torch's generator
on the CPU. So does reading here; from then on the pair is part of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Method
from deltatune.interop.peft_format_common import (
    WRAPPER,
    Fields,
    Kind,
    Piece,
    Placed,
    Stored,
    Tensors,
    exact_targets,
    is_transposed,
)
from deltatune.methods.vera import Vectors, VeRA
from deltatune.storage import layers

DEFAULTS: Fields = {
    "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False, "init_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "modules_to_save": None, "projection_prng_key": 0, "r": 256, "save_projection": True,
    "target_modules": None, "vera_dropout": 0.0,
}  # fmt: skip


def encode_vera(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    method, tensors = parts[0], Tensors()
    assert isinstance(method, VeRA)
    if len(parts) > 1 or not method.save_projection:
        return None
    for place in places:
        unit, at = place.units[0]
        if len(place.units) > 1 or type(unit) is not Vectors or at != "weight" or not layers.is_linear(place.module):
            return None
        tensors |= {f"{place.path}.vera_lambda_b": unit.b.detach(), f"{place.path}.vera_lambda_d": unit.d.detach()}
        tensors |= {"vera_A": unit.projections.a, "vera_B": unit.projections.b}
    return DEFAULTS | {
        "r": method.r,
        "d_initial": method.d_initial,
        "vera_dropout": method.dropout,
        "fan_in_fan_out": any(is_transposed(p.module) for p in places),
        "target_modules": sorted(p.path for p in places),
    }, tensors


def decode_vera(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    config = {**DEFAULTS, **config}
    r = config["r"]
    b, d = stored.take("vera_lambda_b"), stored.take("vera_lambda_d")
    if not b:
        raise DeltatuneError("the file holds no VeRA tensors (…vera_lambda_b)")
    for path in b:
        if not layers.is_linear(module := stored.modules[path]):
            name = layers.plain_class(type(module)).__name__
            raise DeltatuneError(f"{path}: PEFT's VeRA of a {name} is not supported; it is read for linear layers")
        if path not in d or len(d[path]) != r:
            what = f"vera_lambda_d has {len(d[path])} entries, not r = {r}" if path in d else "vera_lambda_d is missing"
            raise DeltatuneError(f"{path}: {what}; the file is damaged, or its configuration is another's")
    shapes = [layers.shape(stored.modules[path], "weight") for path in b]
    out, in_ = max(s[0] for s in shapes), max(s[1] for s in shapes)
    method = VeRA(
        targets=exact_targets(model, b), r=r, d_initial=config["d_initial"], dropout=config["vera_dropout"] or 0.0,
        save_projection=True,
    )  # fmt: skip
    units: list[tuple[str, Tensors]] = [(path, {"b": b[path], "d": d[path]}) for path in b]
    return Piece(method, units, dict(zip("ab", _pair(config, stored, out, in_), strict=True)))


def _pair(config: Mapping[str, Any], stored: Stored, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): those of the file, or what its key gives."""
    r, names = config["r"], ("vera_A", "vera_B")
    found = [stored.left.pop(f"{WRAPPER}{name}", None) for name in names]
    a, b = found
    if a is None or b is None:
        if not config["save_projection"]:
            return drawn(config["projection_prng_key"], r, out, in_)
        missing = names[found.index(None)]
        raise DeltatuneError(f"{missing} is missing although save_projection is True; the file is damaged")
    if len(a) != r or a.shape[1] < in_ or len(b) < out or b.shape[1] != r:
        raise DeltatuneError(
            f"vera_A has shape {tuple(a.shape)} and vera_B {tuple(b.shape)}, but r = {r} and modules up to ({out}, "
            f"{in_}) take at least ({r}, {in_}) and ({out}, {r}); saved for another base?"
        )
    return a[:, :in_], b[:out]


def drawn(key: int, r: int, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) as PEFT draws them: Kaiming-uniform, one after the other."""
    generator = torch.Generator().manual_seed(key)
    bounds = (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in)) for fan_in in (in_, r))
    a, b = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip(((r, in_), (out, r)), bounds, strict=True)
    )
    return a, b


VERA = Kind("VERA", (VeRA,), encode_vera, decode_vera, DEFAULTS, wide=("vera_A", "vera_B"))
