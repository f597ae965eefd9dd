"""(IA)^3 in PEFT's layout: `ia3_l` is (out, 1) where it rescales an output, (1, in) where it rescales an input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltatune.core import DeltatuneError, Method
from deltatune.core.units import Sliced
from deltatune.interop.peft_format_common import Fields, Piece, Placed, Stored, Tensors, exact_targets, is_transposed
from deltatune.methods.ia3 import IA3, ScaledInput, ScaledOutput
from deltatune.storage import layers

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def encode_ia3(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    tensors: Tensors = {}
    inputs: list[str] = []
    for place in places:
        kinds = {type(u.inner if isinstance(u, Sliced) else u) for u, _ in place.units}
        conv = isinstance(place.module, _CONVOLUTIONS)
        if len(kinds) != 1 or not (layers.is_linear(place.module) or conv):
            return None
        if (kind := kinds.pop()) is ScaledOutput:
            l = torch.ones(len(layers.read(place.module, "weight")))
            for unit, _ in place.units:
                if isinstance(unit, Sliced):
                    l[unit.get_buffer("rows").cpu()] *= unit.inner.get_parameter("l").detach().cpu()
                else:
                    l = l * unit.get_parameter("l").detach().cpu()
            shape = (1, -1, *[1] * (place.module.weight.ndim - 2)) if conv else (-1, 1)
            tensors[f"{place.path}.ia3_l"] = l.reshape(shape)
        elif kind is ScaledInput and not conv and not any(isinstance(u, Sliced) for u, _ in place.units):
            inputs.append(place.path)
            scales = torch.stack([u.get_parameter("l").detach() for u, _ in place.units])
            tensors[f"{place.path}.ia3_l"] = scales.prod(0)[None]
        else:
            return None
    paths = [p.path for p in places]
    if any(p.endswith(tuple(inputs)) and p not in inputs for p in paths if inputs):
        return None  # PEFT takes every path that ends in one of `feedforward_modules` for one
    fields: Fields = {
        "exclude_modules": None,
        "fan_in_fan_out": any(is_transposed(p.module) for p in places),
        "feedforward_modules": sorted(inputs),
        "init_ia3_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(paths),
    }
    return fields, tensors


def decode_ia3(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    units: list[tuple[str, Tensors]] = []
    inputs: list[str] = []
    for path, l in stored.take("ia3_l").items():
        module: Any = stored.modules[path]
        on_input = l.shape[0] == 1 and l.shape[1] != 1 if l.ndim == 2 else _is_feedforward(config, path)
        if on_input:
            inputs.append(path)
        if on_input and l.ndim > 2:
            if module.groups != 1:
                raise DeltatuneError(f"{path}: ia3_l on the input of a grouped convolution is not supported")
            l = l.flatten().repeat_interleave(module.weight[0, 0].numel())
        units.append((path, {"l": l.flatten()}))
    if not units:
        raise DeltatuneError("the file holds no (IA)^3 tensors (…ia3_l)")
    on = exact_targets(model, inputs) if inputs else None
    return Piece(IA3(targets=exact_targets(model, [p for p, _ in units]), on_input=on), units)


def _is_feedforward(config: Mapping[str, Any], path: str) -> bool:
    named = config.get("feedforward_modules") or ()
    return re.fullmatch(named, path) is not None if isinstance(named, str) else path.endswith(tuple(named))
