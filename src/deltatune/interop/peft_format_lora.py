"""LoRA and DoRA in PEFT's layout.

PEFT's A and B are our `a` and `b`, in the kernel's shape on a convolution; on an embedding, whose weight is
(tokens, dim), `lora_embedding_A` is b transposed and `lora_embedding_B` a transposed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Intervention, Method
from deltatune.core.method import matching
from deltatune.core.units import Sliced
from deltatune.interop.peft_format_common import (
    Fields,
    Piece,
    Placed,
    Stored,
    Tensors,
    exact_targets,
    frozen,
    is_transposed,
    pattern,
    whole,
)
from deltatune.methods.dora import DoRA, Magnitude
from deltatune.methods.lora import LoRA, LowRank, taken_off
from deltatune.storage import layers

DEFAULTS: Fields = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "target_modules": None,
    "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
_REFUSED = {
    "alora_invocation_tokens": "the adapter acts from its invocation tokens on only",
    "arrow_config": "the adapter is routed among others",
    "kasa_config": "the base is truncated by its singular values",
    "layer_replication": "the base is grown by repeating layers",
    "lora_bias": "B has a bias",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "the factors are sampled",
    "target_parameters": "parameters of experts are adapted",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the inputs are pooled by groups",
    "velora_config": "the activations are compressed",
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")  # those that leave the base as it is


def adaptable(module: Any) -> bool:
    """Whether PEFT's LoRA on this module computes what ours does."""
    if layers.is_linear(module):
        return True
    if isinstance(module, nn.Embedding):
        cls: Any = layers.plain_class(type(module))
        return cls.forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, _CONVOLUTIONS):  # PEFT's A has neither the dilation, the groups nor the padding mode
        return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return False


def _factors(unit: Intervention) -> tuple[float, Tensor, Tensor] | None:
    """(s, up, down) of the whole module, W' = W + s up @ down; None for what is no such delta."""
    if isinstance(unit, Sliced):
        if (inner := _factors(unit.inner)) is None:
            return None
        s, up, down = inner
        return s, up.new_zeros(unit.out, up.shape[1]).index_copy(0, unit.get_buffer("rows"), up), down
    if type(unit) is not LowRank:
        return None
    a, b = unit.a.detach(), unit.b.detach()
    if unit.a0 is not None and unit.b0 is not None:
        b, a = taken_off(a, b, unit.a0, unit.b0)
    if unit.constant is not None:
        a, b = torch.cat([a, unit.constant.down]), torch.cat([b, unit.constant.up / unit.s], 1)
    return float(unit.s), b, a


def _low_rank(units: Sequence[Intervention]) -> tuple[float, Tensor, Tensor] | None:
    """Several deltas of one module as one: their factors side by side, under the largest of their scalings."""
    parts = [_factors(u) for u in units]
    if any(p is None for p in parts):
        return None
    every = [p for p in parts if p is not None]
    s = max((p[0] for p in every), key=abs)
    up = torch.cat([b if si == s else b * (si / s) for si, b, _ in every], 1)
    return s, up, torch.cat([a for _, _, a in every])


def _magnitude(place: Placed) -> tuple[Tensor, list[Intervention]] | None:
    """The whole module's m, and the deltas inside; rows that no unit decomposes keep the norm that they have."""
    inner: list[Intervention] = []
    m: Tensor | None = None
    done: Tensor | None = None
    for unit, _ in place.units:
        piece = unit.inner if isinstance(unit, Sliced) else unit
        if type(piece) is not Magnitude:
            return None
        if not isinstance(unit, Sliced):
            return (piece.m.detach(), [piece.inner]) if len(place.units) == 1 else None
        if m is None or done is None:
            m = torch.linalg.vector_norm(frozen(place.module, "weight").to(piece.m.dtype), dim=1)
            done = torch.zeros(len(m), dtype=torch.bool, device=m.device)
        if bool(done[unit.get_buffer("rows")].any()):
            return None
        done[unit.get_buffer("rows")] = True
        m = m.index_copy(0, unit.get_buffer("rows"), piece.m.detach().to(m.device))
        inner.append(Sliced(piece.inner, unit.get_buffer("rows"), unit.out))
    return None if m is None else (m, inner)


def encode_lora(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    inner = [p.inner if isinstance(p, DoRA) else p for p in parts]
    if not all(type(p) is LoRA for p in inner):
        return None
    dora = isinstance(parts[0], DoRA)
    root = all(p.scaling == "alpha/sqrt(r)" for p in inner)  # type: ignore[attr-defined]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: Tensors = {}
    for place in places:
        if not adaptable(place.module) or any(at != "weight" for _, at in place.units):
            return None
        units = [u for u, _ in place.units]
        if dora:
            if (decomposed := _magnitude(place)) is None:
                return None
            m, units = decomposed
            shape = (1, -1, *[1] * (place.module.weight.ndim - 2)) if isinstance(place.module, _CONVOLUTIONS) else (-1,)
            tensors[f"{place.path}.lora_magnitude_vector"] = m.reshape(shape)
        if (found := _low_rank(units)) is None:
            return None
        s, up, down = found
        r = ranks[place.path] = len(down)
        alphas[place.path] = whole(s * (math.sqrt(r) if root else r))
        tensors |= {f"{place.path}.{n}": t for n, t in _stored(place.module, up, down).items()}
    r, rank_pattern = pattern(ranks)
    alpha, alpha_pattern = pattern(alphas)
    fields = DEFAULTS | {
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": root,
        "use_dora": dora,
        "lora_dropout": inner[0].dropout,  # type: ignore[attr-defined]
        "fan_in_fan_out": any(is_transposed(p.module) for p in places),
        "target_modules": sorted(p.path for p in places),
    }
    return fields, tensors


def _stored(module: Any, up: Tensor, down: Tensor) -> Tensors:
    if isinstance(module, nn.Embedding):
        return {"lora_embedding_A": up.T, "lora_embedding_B": down.T}
    if isinstance(module, _CONVOLUTIONS):
        kernel = module.weight.shape[1:]
        down, up = down.reshape(len(down), *kernel), up.reshape(*up.shape, *[1] * (len(kernel) - 1))
    return {"lora_A.weight": down, "lora_B.weight": up}


def refuse(config: Mapping[str, Any]) -> None:
    """Raises for the fields of a LoRA configuration that change the maths in ways that are not read."""
    for name, why in _REFUSED.items():
        if config.get(name):
            raise DeltatuneError(f"adapter_config.json: {name} = {config[name]!r} is not supported ({why})")
    init = str(config.get("init_lora_weights", True)).lower()
    if init not in (*_PLAIN_INITS, "pissa", "olora"):
        raise DeltatuneError(
            f"adapter_config.json: init_lora_weights = {config['init_lora_weights']!r} changes the base in a way that "
            "the file does not hold; save it in PEFT with `path_initial_model_for_weight_conversion`"
        )


def decode_lora(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    refuse(config)
    down = stored.take("lora_A.weight") | {p: t.T for p, t in stored.take("lora_embedding_B").items()}
    up = stored.take("lora_B.weight") | {p: t.T for p, t in stored.take("lora_embedding_A").items()}
    m = stored.take("lora_magnitude_vector", "lora_magnitude_vector.weight")
    init = str(config.get("init_lora_weights", True)).lower()
    start = init if init in ("pissa", "olora") else None
    method = _method(config, 2 if start else 1)
    units: list[tuple[str, Tensors]] = []
    for path in down:
        module = stored.modules[path]
        r = matching(config.get("rank_pattern") or {}, path, config.get("r", 8))
        if path not in up or len(down[path]) != r:
            what = "lora_B is missing" if path not in up else f"lora_A has rank {len(down[path])}, not r = {r}"
            raise DeltatuneError(f"{path}: {what}; the file is damaged, or its configuration is another's")
        if not adaptable(module):
            kind = layers.plain_class(type(module)).__name__
            raise DeltatuneError(f"{path}: PEFT's LoRA of this {kind} is no delta of its weight, and is not supported")
        a, b = down[path].flatten(1), up[path].flatten(1)
        if start:
            alpha = matching(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
            b0, a0 = _start(start, path, module, r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
            b, a = taken_off(a, b, a0.to(a), b0.to(b))
        own = {"a": a, "b": b}
        if m or config.get("use_dora"):
            own = {f"inner.{n}": t for n, t in own.items()} | ({"m": m[path].flatten()} if path in m else {})
        units.append((path, own))
    if not units:
        raise DeltatuneError("the file holds no LoRA tensors (…lora_A.weight)")
    targets = exact_targets(model, down)
    if m or config.get("use_dora"):
        return Piece(DoRA(targets=targets, inner=method), units)
    return Piece(method.__class__(**{**vars(method), "targets": targets}), units)


def _method(config: Mapping[str, Any], times: int) -> LoRA:
    """`times`: how often the rank holds r, under the same scaling."""
    root = bool(config.get("use_rslora"))
    grown = math.sqrt(times) if root else times
    return LoRA(
        r=times * config.get("r", 8),
        alpha=grown * config.get("lora_alpha", 8),
        scaling="alpha/sqrt(r)" if root else "alpha/r",
        dropout=config.get("lora_dropout") or 0.0,
        ranks={k: times * v for k, v in (config.get("rank_pattern") or {}).items()},
        alphas={k: grown * v for k, v in (config.get("alpha_pattern") or {}).items()},
    )


def _start(init: str, path: str, module: nn.Module, r: int, s: float) -> tuple[Tensor, Tensor]:
    """(b0, a0): what PEFT takes off the base, times s, each time that it attaches an adapter with this `init`."""
    if not layers.is_linear(module) or (init == "olora" and is_transposed(module)):
        raise DeltatuneError(f"{path}: init_lora_weights = {init!r} is not defined for a {type(module).__name__}")
    w = frozen(module, "weight").float()
    if init == "olora":
        q, upper = torch.linalg.qr(w)
        return q[:, :r], upper[:r]
    u, sigma, v = torch.linalg.svd(w, full_matrices=False)
    return u[:, :r] * (sigma[:r] / s), v[:r]
