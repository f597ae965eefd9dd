"""OFT, COFT, OFTv2 and BOFT on linear layers in PEFT's layout.

PEFT has one OFT. By default it is OFTv2, whose series PEFT counts otherwise: `num_cayley_neumann_terms` = k + 2. With
`use_cayley_neumann` false it is OFT by an exact Cayley transform, (I - Q)(I + Q)^-1, so that Q has the other sign. So
have BOFT's blocks, which are kept whole. COFT's `eps` is ours times the root of the number of blocks.

More than one butterfly factor is read by PEFT only where its CUDA extension was built.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltatune.core import DeltatuneError, Method
from deltatune.interop.peft_format_common import Fields, Piece, Placed, Stored, Tensors, grouped, is_transposed
from deltatune.methods.boft import BOFT, Butterfly
from deltatune.methods.coft import COFT, Constrained
from deltatune.methods.oft import OFT, Rotation, skew
from deltatune.methods.oft_v2 import CayleyNeumann, OFTv2
from deltatune.storage import layers

_BESIDE: Fields = {
    "bias": "none", "exclude_modules": None, "fan_in_fan_out": False, "init_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "modules_to_save": None,
}  # fmt: skip
OFT_DEFAULTS: Fields = _BESIDE | {
    "block_share": False, "coft": False, "eps": 6e-5, "module_dropout": 0.0, "num_cayley_neumann_terms": 5,
    "oft_block_size": 32, "r": 0, "use_cayley_neumann": True,
}  # fmt: skip
BOFT_DEFAULTS: Fields = _BESIDE | {
    "boft_block_num": 0, "boft_block_size": 4, "boft_dropout": 0.0, "boft_n_butterfly_factor": 1
}  # fmt: skip
_NEGLIGIBLE = 1e-8  # what a series may be off from the exact transform, relative to one


def _rotations(places: Sequence[Placed], kinds: tuple[type[Rotation], ...]) -> dict[str, Any] | None:
    """Module path -> its one rotation of all its inputs; None where PEFT has no such thing."""
    found: dict[str, Any] = {}
    for place in places:
        unit, at = place.units[0]
        linear = layers.is_linear(place.module) and not is_transposed(place.module)
        if len(place.units) != 1 or type(unit) not in kinds or at != "weight" or not linear:
            return None
        found[place.path] = unit
    return found


def _sizes(places: Sequence[Placed], units: Mapping[str, Any]) -> tuple[int, int] | None:
    """(block size, number of blocks), one of the two 0; None if neither is the same everywhere."""
    sizes = {u.size for u in units.values()}
    counts = {layers.shape(p.module, "weight")[1] // units[p.path].size for p in places}
    if len(sizes) == 1:
        return sizes.pop(), 0
    return (0, counts.pop()) if len(counts) == 1 else None


def encode_oft(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    units = _rotations(places, (Rotation, Constrained, CayleyNeumann))
    if units is None or any(u.d is not None for u in units.values()) or (size := _sizes(places, units)) is None:
        return None
    fields = OFT_DEFAULTS | {"target_modules": sorted(units), "oft_block_size": size[0], "r": size[1]}
    shared = {p.blocks == "shared" for p in parts}  # type: ignore[attr-defined]
    powers = {p.k for p in parts if isinstance(p, OFTv2)}
    balls = {round(u.eps * math.sqrt(len(u.q)), 12) for u in units.values() if type(u) is Constrained}
    if len(shared) > 1 or len(powers) > 1 or len(balls) > 1 or 1 in powers:
        return None
    fields["block_share"], fields["use_cayley_neumann"] = shared.pop(), bool(powers)
    if powers:
        fields["num_cayley_neumann_terms"] = powers.pop() + 2
    if balls:
        fields |= {"coft": True, "eps": balls.pop()}
    sign = 1 if fields["use_cayley_neumann"] else -1
    return fields, {f"{path}.oft_R.weight": sign * u.q.detach() for path, u in units.items()}


def encode_boft(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    units = _rotations(places, (Butterfly,))
    if units is None or (size := _sizes(places, units)) is None:
        return None
    factors = {len(u.q) for u in units.values()}
    rates = {u.p1 * u.p2 for u in units.values()}
    if len(factors) > 1 or len(rates) > 1:
        return None
    tensors: Tensors = {}
    for place in places:
        u = units[place.path]
        tensors[f"{place.path}.boft_R"] = skew(-u.q.detach(), u.size)
        d = u.q.new_ones(layers.shape(place.module, "weight")[0]) if u.d is None else u.d
        tensors[f"{place.path}.boft_s"] = d.detach()[:, None]
    return BOFT_DEFAULTS | {
        "boft_block_size": size[0],
        "boft_block_num": size[1],
        "boft_dropout": rates.pop(),
        "boft_n_butterfly_factor": factors.pop(),
        "target_modules": sorted(units),
    }, tensors


def _linear(stored: Stored, path: str, kind: str) -> None:
    if not layers.is_linear(stored.modules[path]) or is_transposed(stored.modules[path]):
        name = layers.plain_class(type(stored.modules[path])).__name__
        raise DeltatuneError(f"{path}: PEFT's {kind} of a {name} is not supported; it is read for linear layers")


def decode_oft(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    config = {**OFT_DEFAULTS, **config}
    cls, options, sign = _kind(config)
    found: dict[Any, list[tuple[str, Tensors]]] = {}
    for path, q in stored.take("oft_R.weight").items():
        _linear(stored, path, "OFT")
        own = options | {"block_size": (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2}
        if cls is COFT:
            own["eps"] = config["eps"] / math.sqrt(len(q))
        found.setdefault(tuple(own.items()), []).append((path, {"q": sign * q}))
    if not found:
        raise DeltatuneError("the file holds no OFT tensors (…oft_R.weight); those of PEFT before 0.16 are not read")
    if rate := config["module_dropout"]:
        why = "acts in training alone, and is not kept"
        warnings.warn(f"adapter_config.json: module_dropout = {rate} {why}", stacklevel=5)
    return grouped(model, found, cls)


def _kind(config: Mapping[str, Any]) -> tuple[type[OFT], dict[str, Any], int]:
    """(method, its options, the sign of Q) for a configuration."""
    options: dict[str, Any] = {"blocks": "shared" if config["block_share"] else "own"}
    if not config["use_cayley_neumann"]:
        return (COFT if config["coft"] else OFT), options, -1
    terms = config["num_cayley_neumann_terms"]
    if terms < 3:
        raise DeltatuneError(f"adapter_config.json: num_cayley_neumann_terms = {terms} is not supported; 3 or more are")
    k = max(2, terms - 2)  # 3 and 4 are the same series
    if not config["coft"]:
        return OFTv2, options | {"k": k}, 1
    if config["eps"] ** (k + 1) > _NEGLIGIBLE:
        raise DeltatuneError(
            f"adapter_config.json: coft with eps = {config['eps']} and num_cayley_neumann_terms = {terms} is not "
            "supported: COFT is exact here, and the series is not; save it with use_cayley_neumann = False"
        )
    return COFT, options, 1


def decode_boft(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    blocks, scales = stored.take("boft_R"), stored.take("boft_s")
    learned = any(bool((s != 1).any()) for s in scales.values())
    found: dict[Any, list[tuple[str, Tensors]]] = {}
    for path, c in blocks.items():
        _linear(stored, path, "BOFT")
        if path not in scales or c.ndim != 4:
            what = "boft_s is missing" if c.ndim == 4 else f"boft_R has shape {tuple(c.shape)}, not four dimensions"
            raise DeltatuneError(f"{path}: {what}; the file is damaged")
        rows, columns = torch.triu_indices(c.shape[-1], c.shape[-1], 1)
        own = {"q": 0.5 * (c.mT - c)[..., rows, columns]} | ({"d": scales[path].flatten()} if learned else {})
        options: dict[str, Any] = {"block_size": c.shape[-1], "m": len(c), "p2": config.get("boft_dropout") or 0.0}
        options["magnitude"] = "learned" if learned else "kept"
        found.setdefault(tuple(options.items()), []).append((path, own))
    if not found:
        raise DeltatuneError("the file holds no BOFT tensors (…boft_R)")
    return grouped(model, found, BOFT)
