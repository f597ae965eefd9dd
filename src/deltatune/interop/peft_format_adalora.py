"""AdaLoRA in PEFT's layout. PEFT gives every module `init_r` triplets, so those with fewer are filled with zeros.

Its scaling is alpha / (init_r + 1e-5), whatever is left of the rank; `rank_pattern` tells which triplets a file leaves
out. `total_step` is a property of the run here, and the least that PEFT accepts in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deltatune.core import DeltatuneError, Intervention, Method
from deltatune.core.units import Sliced
from deltatune.interop.peft_format_common import Fields, Piece, Placed, Stored, Tensors, exact_targets, is_transposed
from deltatune.interop.peft_format_lora import DEFAULTS, refuse
from deltatune.methods.adalora import AdaLoRA, Triplets
from deltatune.storage import layers

_OPTIONS = {
    "target_r": "target_r", "init_r": "init_r", "t_init": "tinit", "t_final": "tfinal", "every": "deltaT",
    "beta1": "beta1", "beta2": "beta2", "orthogonality": "orth_reg_weight", "dropout": "lora_dropout",
}  # fmt: skip
_PEFT_DEFAULTS = {
    "target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
    "orth_reg_weight": 0.5, "lora_dropout": 0.0,
}  # fmt: skip
EPSILON = 1e-5


def _triplets(unit: Intervention) -> tuple[float, Tensor, Tensor, Tensor] | None:
    """(s, a, b, e) of the whole module."""
    if isinstance(unit, Sliced):
        if (inner := _triplets(unit.inner)) is None:
            return None
        s, a, b, e = inner
        return s, a, b.new_zeros(unit.out, b.shape[1]).index_copy(0, unit.get_buffer("rows"), b), e
    if type(unit) is not Triplets:
        return None
    return unit.s, unit.a.detach(), unit.b.detach(), unit.e.detach()


def encode_adalora(
    model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]
) -> tuple[Fields, Tensors] | None:
    method = parts[0]
    assert isinstance(method, AdaLoRA)
    found: dict[str, list[tuple[float, Tensor, Tensor, Tensor]]] = {}
    for place in places:
        triplets = [_triplets(u) for u, _ in place.units]
        if not layers.is_linear(place.module) or any(t is None for t in triplets):
            return None
        found[place.path] = [t for t in triplets if t is not None]
    scalings = {s for ts in found.values() for s, *_ in ts}
    ranks = {path: sum(len(a) for _, a, _, _ in ts) for path, ts in found.items()}
    r = max(ranks.values())
    if len(scalings) != 1:
        return None
    tensors: Tensors = {}
    for path, ts in found.items():
        more = r - ranks[path]
        tensors[f"{path}.lora_A"] = pad(torch.cat([a for _, a, _, _ in ts]), (0, 0, 0, more))
        tensors[f"{path}.lora_B"] = pad(torch.cat([b for _, _, b, _ in ts], 1), (0, more))
        tensors[f"{path}.lora_E"] = pad(torch.cat([e for _, _, _, e in ts]), (0, 0, 0, more))
    alpha = method.alpha if r == method.init_r else scalings.pop() * (r + EPSILON)
    fields = DEFAULTS | {theirs: getattr(method, ours) for ours, theirs in _OPTIONS.items()}
    fields |= {
        "init_r": r,
        "target_r": method.target_r * r // method.init_r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": None,
        "total_step": method.t_init + method.t_final + 1,
        "fan_in_fan_out": any(is_transposed(p.module) for p in places),
        "target_modules": sorted(found),
    }
    return fields, tensors


def decode_adalora(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    refuse(config)
    options: dict[str, Any] = {ours: config.get(theirs, _PEFT_DEFAULTS[theirs]) for ours, theirs in _OPTIONS.items()}
    a, b, e = stored.take("lora_A"), stored.take("lora_B"), stored.take("lora_E")
    pattern = {k.rpartition(".")[0]: v for k, v in (config.get("rank_pattern") or {}).items()}
    r = options["init_r"]
    units: list[tuple[str, Tensors]] = []
    for path in a:
        if path not in b or path not in e or not layers.is_linear(stored.modules[path]):
            raise DeltatuneError(f"{path}: AdaLoRA is read for linear layers with lora_A, lora_B and lora_E")
        kept = torch.tensor(pattern.get(path, [True] * r)).nonzero().flatten()
        if len(a[path]) == r:
            kept = torch.arange(r)
        if len(kept) != len(a[path]) or len(kept) != len(e[path]):
            raise DeltatuneError(f"{path}: {len(a[path])} triplets, but init_r and rank_pattern leave {len(kept)}")
        whole = {n: t.new_zeros(r, t.shape[1]).index_copy(0, kept, t) for n, t in (("a", a[path]), ("e", e[path]))}
        whole["b"] = b[path].new_zeros(len(b[path]), r).index_copy(1, kept, b[path])
        units.append((path, whole))
    if not units:
        raise DeltatuneError("the file holds no AdaLoRA tensors (…lora_E)")
    options["target_r"] = max(1, min(options["target_r"], r))
    return Piece(AdaLoRA(targets=exact_targets(model, a), alpha=config.get("lora_alpha", 8), **options), units)
