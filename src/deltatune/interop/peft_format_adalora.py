"""AdaLoRA in PEFT's layout. PEFT gives every module `init_r` triplets, so those with fewer are filled with zeros.

Once no more triplets are left than the budget, those with l = 0, which add nothing, are cut from the tensors, and
`rank_pattern` says of each module which are there. The scaling stays alpha / (init_r + 1e-5). Read again, they begin
anew, at l = 0, so that training may choose them. `total_step` is a property of the run here, and the least that PEFT
accepts in the file.
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
from deltatune.methods.adalora import STD, AdaLoRA, Triplets
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
_Triplets = tuple[float, Tensor, Tensor, Tensor]


def _triplets(unit: Intervention) -> _Triplets | None:
    """(s, a, b, e) of the whole module."""
    if isinstance(unit, Sliced):
        if (inner := _triplets(unit.inner)) is None:
            return None
        s, a, b, e = inner
        return s, a, b.new_zeros(unit.out, b.shape[1]).index_copy(0, unit.get_buffer("rows"), b), e
    if type(unit) is not Triplets:
        return None
    return unit.s, unit.a.detach(), unit.b.detach(), unit.e.detach()


def _whole(triplets: Sequence[_Triplets], r: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, e) of a module's triplets side by side, with zeros up to `r` of them."""
    _, a, b, e = zip(*triplets, strict=True)
    more = r - sum(map(len, e))
    return pad(torch.cat(a), (0, 0, 0, more)), pad(torch.cat(b, 1), (0, more)), pad(torch.cat(e), (0, 0, 0, more))


def encode_adalora(
    model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]
) -> tuple[Fields, Tensors] | None:
    method = parts[0]
    assert isinstance(method, AdaLoRA)
    found: dict[str, list[_Triplets]] = {}
    for place in places:
        triplets = [_triplets(u) for u, _ in place.units]
        if not layers.is_linear(place.module) or any(t is None for t in triplets):
            return None
        found[place.path] = [t for t in triplets if t is not None]
    every = [t for ts in found.values() for t in ts]
    scalings = {s for s, *_ in every}
    if len(scalings) != 1:
        return None
    r = max(sum(len(a) for _, a, _, _ in ts) for ts in found.values())
    left, made = sum(int(e.count_nonzero()) for *_, e in every), sum(len(e) for *_, e in every)
    final = 0 < left <= method.target_r * len(every) and left < made  # none is left before training
    ranks: dict[str, list[bool]] = {}
    tensors: Tensors = {}
    for path, ts in found.items():
        a, b, e = _whole(ts, r)
        if final:
            kept = e[:, 0] != 0
            ranks[f"{path}.lora_E"] = kept.tolist()
            a, b, e = a[kept], b[:, kept], e[kept]
        tensors |= {f"{path}.lora_A": a, f"{path}.lora_B": b, f"{path}.lora_E": e}
    alpha = method.alpha if r == method.init_r else scalings.pop() * (r + EPSILON)
    fields = DEFAULTS | {theirs: getattr(method, ours) for ours, theirs in _OPTIONS.items()}
    fields |= {
        "init_r": r,
        "target_r": method.target_r * r // method.init_r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": ranks or None,
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
    r, generator = options["init_r"], torch.Generator().manual_seed(0)
    units: list[tuple[str, Tensors]] = []
    for path in sorted(a):  # the order of a file's tensors is not the same at each reading
        if path not in b or path not in e or not layers.is_linear(stored.modules[path]):
            raise DeltatuneError(f"{path}: AdaLoRA is read for linear layers with lora_A, lora_B and lora_E")
        n = len(a[path])
        if n > r or {b[path].shape[1], len(e[path])} != {n}:
            raise DeltatuneError(
                f"{path}: lora_A, lora_B and lora_E hold {n}, {b[path].shape[1]} and {len(e[path])} triplets, of "
                f"init_r={r}; the file is damaged, or its configuration is another's"
            )
        at = torch.tensor(pattern.get(path, ())).nonzero().flatten()
        if len(at) != n:  # as of a live adapter, which has no pattern; the outputs are the same in any order
            at = torch.arange(n)
        parts = (("a", a[path], 0, STD), ("b", b[path], 1, STD), ("e", e[path], 0, 0.0))
        units.append((path, {k: _filled(t, dim, at, r, std, generator) for k, t, dim, std in parts}))
    if not units:
        raise DeltatuneError("the file holds no AdaLoRA tensors (…lora_E)")
    options["target_r"] = max(1, min(options["target_r"], r))
    return Piece(AdaLoRA(targets=exact_targets(model, a), alpha=config.get("lora_alpha", 8), **options), units)


def _filled(t: Tensor, dim: int, at: Tensor, r: int, std: float, generator: torch.Generator) -> Tensor:
    """`t`, along whose `dim` are the triplets `at`, with all `r` of them: the others as in a new adapter."""
    if t.shape[dim] == r:
        return t
    shape = [*t.shape[:dim], r, *t.shape[dim + 1 :]]
    return (std * torch.randn(shape, generator=generator)).to(t).index_copy(dim, at.to(t.device), t)
