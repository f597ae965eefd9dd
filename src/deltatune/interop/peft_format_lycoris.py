"""LoHa and LoKr in PEFT's layout. The factors are ours, as `hada_…` and `lokr_…`.

With `use_effective_conv2d` a factor of a convolution has a core t (r, r, kernel), W_pqk = sum_ij a_ip b_jq t_ijk: read
as the product of two matrices that it is, a' and t b, and written so. PEFT splits n by a `decompose_factor` f that
divides it as (f, n / f), also where f is the larger part. Its LoKr of a Conv1d whose w2 is whole is no Kronecker
product of kernels, and neither written nor read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Intervention, Method
from deltatune.core.method import matching
from deltatune.core.units import Sliced
from deltatune.interop.peft_format_common import (
    Fields,
    Kind,
    Piece,
    Placed,
    Stored,
    Tensors,
    grouped,
    is_transposed,
    pattern,
    whole,
)
from deltatune.methods.krona import split
from deltatune.methods.loha import HadamardProduct, LoHa
from deltatune.methods.lokr import LoKr, Product
from deltatune.storage import layers

_BOTH: Fields = {
    "alpha": 8, "alpha_pattern": {}, "exclude_modules": None, "init_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None, "r": 8, "rank_dropout": 0.0,
    "rank_pattern": {}, "target_modules": None, "use_effective_conv2d": False,
}  # fmt: skip
LOHA_DEFAULTS: Fields = _BOTH
LOKR_DEFAULTS: Fields = _BOTH | {"decompose_both": False, "decompose_factor": -1, "rank_dropout_scale": False}
_HADAMARD = ("w1_a", "w1_b", "w2_a", "w2_b")
Sides = tuple[int, int]


def adaptable(module: Any) -> bool:
    """Whether PEFT's LoHa and LoKr on this module compute what ours do."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.padding_mode == "zeros"
    return layers.is_linear(module) and not is_transposed(module)


def _fields(defaults: Fields, ranks: Mapping[str, int], scales: Mapping[str, float]) -> Fields:
    """`scales`: s = alpha / r, by module."""
    r, rank_pattern = pattern(ranks)
    alpha, alpha_pattern = pattern({path: whole(s * ranks[path]) for path, s in scales.items()})
    own = {"r": r, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern}
    return defaults | own | {"target_modules": sorted(ranks)}


def _options(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    names = ("r", "rank_pattern"), ("alpha", "alpha_pattern")
    return {name: matching(config[patterns] or {}, path, config[name]) for name, patterns in names}


def _checked(config: Mapping[str, Any], stored: Stored, kind: str, paths: Mapping[str, Any]) -> None:
    if not paths:
        raise DeltatuneError(f"the file holds no {kind} tensors (…{'hada' if kind == 'LoHa' else 'lokr'}_w1…)")
    for path in paths:
        if not adaptable(module := stored.modules[path]):
            name = layers.plain_class(type(module)).__name__
            what = "it is read for linear layers, and for convolutions in one or two dimensions padded with zeros"
            raise DeltatuneError(f"{path}: PEFT's {kind} of this {name} is not supported; {what}")
    for name in ("rank_dropout", "module_dropout"):
        if rate := config[name]:
            why = "acts in training alone, and is not kept"
            warnings.warn(f"adapter_config.json: {name} = {rate} {why}", stacklevel=6)


def _flat(a: Tensor, b: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows, r) and (r, columns x kernel)."""
    return (a, b) if t is None else (a.T, torch.einsum("ij...,jq->iq...", t, b).flatten(1))


def _ranked(path: str, name: str, b: Tensor, r: int) -> None:
    if len(b) != r:
        what = f"{name} has rank {len(b)}, not r = {r}"
        raise DeltatuneError(f"{path}: {what}; the file is damaged, or its configuration is another's")


# LoHa


def _hadamard(unit: Intervention) -> tuple[float, Tensors] | None:
    """(s, factors) of the whole module; None for what is no such product."""
    if isinstance(unit, Sliced):
        if (inner := _hadamard(unit.inner)) is None:
            return None
        s, own = inner
        rows = unit.get_buffer("rows")
        spread = {n: own[n].new_zeros(unit.out, own[n].shape[1]).index_copy(0, rows, own[n]) for n in ("w1_a", "w2_a")}
        return s, own | spread
    if type(unit) is not HadamardProduct:
        return None
    return unit.s, {n: getattr(unit, n).detach() for n in _HADAMARD}


def _side_by_side(place: Placed) -> tuple[float, Tensors] | None:
    """The products of one module as one: of rows of their own, factors side by side have no terms in common."""
    found = [_hadamard(unit) for unit, at in place.units if at == "weight"]
    rows = [unit.get_buffer("rows") for unit, _ in place.units if isinstance(unit, Sliced)]
    if None in found or len(found) != len(place.units):
        return None
    if len(found) > 1 and (len(rows) != len(found) or len(torch.cat(rows).unique()) != sum(map(len, rows))):
        return None
    products = [p for p in found if p is not None]
    s = max((s for s, _ in products), key=abs)
    scaled = [own if si == s else own | {"w1_a": own["w1_a"] * (si / s)} for si, own in products]
    return s, {n: torch.cat([own[n] for own in scaled], 1 if n.endswith("a") else 0) for n in _HADAMARD}


def encode_loha(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    tensors: Tensors = {}
    for place in places:
        if not adaptable(place.module) or (found := _side_by_side(place)) is None:
            return None
        scales[place.path], own = found
        ranks[place.path] = len(own["w1_b"])
        tensors |= {f"{place.path}.hada_{n}": t for n, t in own.items()}
    return _fields(LOHA_DEFAULTS, ranks, scales), tensors


def decode_loha(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    config = {**LOHA_DEFAULTS, **config}
    held = {n: stored.take(f"hada_{n}") for n in (*_HADAMARD, "t1", "t2")}
    _checked(config, stored, "LoHa", held["w1_a"])
    found: dict[Any, list[tuple[str, Tensors]]] = {}
    for path in held["w1_a"]:
        options, own = _options(config, path), Tensors()
        if absent := [n for n in _HADAMARD if path not in held[n]]:
            raise DeltatuneError(f"{path}: hada_{absent[0]} is missing; the file is damaged")
        for i in "12":
            a, b = held[f"w{i}_a"][path], held[f"w{i}_b"][path]
            _ranked(path, f"hada_w{i}_b", b, options["r"])
            own[f"w{i}_a"], own[f"w{i}_b"] = _flat(a, b, held[f"t{i}"].get(path))
        found.setdefault(tuple(options.items()), []).append((path, own))
    return grouped(model, found, LoHa)


# LoKr


def parts_of(n: int, factor: int) -> Sides:
    """How PEFT splits n."""
    return (factor, n // factor) if factor > 0 and n % factor == 0 else split(n, factor)


def sides(module: Any) -> tuple[int, int, int]:
    """out, in without the kernel, and the kernel."""
    kernel = math.prod(module.weight.shape[2:]) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1
    out, in_ = layers.shape(module, "weight")
    return out, in_ // kernel, kernel


def _shapes(module: Any, factor: int, both: bool, r: int) -> tuple[Sides, Sides, bool, bool]:
    """Those of w1 and w2 (without the kernel) by PEFT's rules, and whether each is a product through r."""
    out, in_, _ = sides(module)
    (l, k), (m, n) = parts_of(out, factor), parts_of(in_, factor)
    return (l, m), (k, n), both and 2 * r < max(l, m), 2 * r < max(k, n)


def _shapes_of(unit: Product, kernel: int) -> tuple[Sides, Sides, bool, bool]:
    w1, w2 = unit.factor("w1"), unit.factor("w2")
    first, second = (w1[0].shape[0], w1[-1].shape[1]), (w2[0].shape[0], w2[-1].shape[1] // kernel)
    return first, second, len(w1) == 2, len(w2) == 2


def encode_lokr(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    units: dict[str, Product] = {}
    ranks: dict[str, int] = {}
    shapes: dict[str, tuple[Sides, Sides, bool, bool]] = {}
    for place in places:
        unit, at = place.units[0]
        if len(place.units) > 1 or type(unit) is not Product or at != "weight" or not adaptable(place.module):
            return None
        if isinstance(place.module, nn.Conv1d) and hasattr(unit, "w2"):
            return None
        units[place.path], shapes[place.path] = unit, _shapes_of(unit, sides(place.module)[2])
        through = [f[0].shape[1] for f in map(unit.factor, ("w1", "w2")) if len(f) == 2]
        enough = [p.r for p in parts if isinstance(p, LoKr) and 2 * p.r >= max(shapes[place.path][1])]
        if not (known := [*through, *enough]):
            return None
        ranks[place.path] = known[0]  # of whole factors any that is enough will do
    given = [(p.factor, "w1" in p.decompose) for p in parts if isinstance(p, LoKr)]
    factors = [f for f, _ in given] + [-1] + [w1[0] for w1, *_ in shapes.values()]
    for factor, both in dict.fromkeys([*given, *product(factors, (False, True))]):
        if all(_shapes(p.module, factor, both, ranks[p.path]) == shapes[p.path] for p in places):
            break
    else:
        return None
    tensors: Tensors = {}
    for place in places:
        for name, p in units[place.path].named_parameters():
            kernel = place.module.weight.shape[2:] if name == "w2" and isinstance(place.module, nn.Conv2d) else ()
            tensors[f"{place.path}.lokr_{name}"] = p.detach().reshape(len(p), -1, *kernel)
    fields = _fields(LOKR_DEFAULTS, ranks, {path: unit.s for path, unit in units.items()})
    return fields | {"decompose_factor": factor, "decompose_both": both}, tensors


def refuse_split(path: str, module: nn.Module, factor: int) -> None:
    for n in sides(module)[:2]:
        if parts_of(n, factor) != split(n, factor):
            raise DeltatuneError(
                f"{path}: decompose_factor = {factor} splits {n} into {parts_of(n, factor)}, the larger first, which "
                f"is not supported; give -1, or a factor of up to {math.isqrt(n)}"
            )


def decode_lokr(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    config = {**LOKR_DEFAULTS, **config}
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    held: dict[str, Tensors] = {}
    for name in names:
        for path, t in stored.take(f"lokr_{name}").items():
            held.setdefault(path, {})[name] = t
    _checked(config, stored, "LoKr", held)
    f = config["decompose_factor"]
    same = {"factor": f if f > 0 or f == -1 else 1, "decompose": ("w1", "w2") if config["decompose_both"] else ("w2",)}
    found: dict[Any, list[tuple[str, Tensors]]] = {}
    for path, own in held.items():
        module, options = stored.modules[path], _options(config, path) | same
        refuse_split(path, module, f)
        for name in ("w1", "w2"):
            if name in own:
                own[name] = own[name].flatten(1)
                continue
            pair = [own.get(f"{name}_{n}") for n in "ab"]
            if pair[0] is None or pair[1] is None:
                raise DeltatuneError(f"{path}: lokr_{name} is missing; the file is damaged")
            _ranked(path, f"lokr_{name}_b", pair[1], options["r"])
            own[f"{name}_a"], own[f"{name}_b"] = _flat(pair[0], pair[1], own.pop("t2", None) if name == "w2" else None)
        if isinstance(module, nn.Conv1d) and "w2" in own:
            raise DeltatuneError(
                f"{path}: PEFT's LoKr of a Conv1d with lokr_w2 whole (r = {options['r']}) is no Kronecker product of "
                f"its kernels, and is not supported; train it with r below {max(_shapes(module, f, False, 1)[1]) / 2:g}"
            )
        found.setdefault(tuple(options.items()), []).append((path, own))
    return grouped(model, found, LoKr)


LOHA = Kind("LOHA", (LoHa,), encode_loha, decode_loha, LOHA_DEFAULTS)
LOKR = Kind("LOKR", (LoKr,), encode_lokr, decode_lokr, LOKR_DEFAULTS)
