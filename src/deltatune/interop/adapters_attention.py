"""Prefixes and changes of weights as the package `adapters` saves them, and UniPELT, which has both and adapters.

    prefix_tuning.prefix_tunings.<name>.<group>.wte.weight (p, d), control_trans.0.weight (m, d), .bias,
                                                control_trans.2.weight (2 layers heads width, m), .bias
                                        or of a flat one control_trans (p 2 layers heads width)
    <attention>.prefix_tuning.prefix_gates.<name>.weight (1, d), .bias
    <linear>.loras.<name>.lora_A (r, in), lora_B (out, r), [gate.weight (1, in), .bias];    (IA)3: lora_B (out, 1)

Groups are the attentions of an encoder, those of a decoder, and its cross-attentions; layers are counted in each. On a
fused projection A and B are those of its adapted pieces one below the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from deltatune.core import DeltatuneError, Fused, Method, Part, Site, resolve
from deltatune.interop.adapters_bottleneck import Saved, decode_bottleneck, refuse
from deltatune.interop.peft_format_common import Piece, Tensors, exact_targets
from deltatune.methods.ia3 import IA3
from deltatune.methods.lora import LoRA
from deltatune.methods.pfeiffer import Pfeiffer
from deltatune.methods.prefix import PrefixTuning
from deltatune.methods.unipelt import UniPELT
from deltatune.models import anatomy
from deltatune.models.prefixing import geometry, group
from deltatune.storage import layers

_PREFIX = {"encoder_prefix": "encoder", "cross_prefix": "cross", "self_prefix": "decoder"}
_PREFIX_TUNING: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("flat", "prefix_length", "bottleneck_size", "dropout"), ()
) | {"encoder_prefix": (True,), "cross_prefix": (True,), "non_linearity": ("tanh",), "shared_gating": (True,)}
_GATED: dict[str, tuple[Any, ...]] = {"use_gating": (True,)}
_LORA: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "r", "alpha", "dropout"), ()
) | {"composition_mode": ("add", "scale")}


def decode_prefix(config: Mapping[str, Any], saved: Saved, **more: tuple[Any, ...]) -> list[Piece]:
    refuse("prefix tuning", config, **{**_PREFIX_TUNING, **more})
    model, attentions = saved.model, resolve(saved.model, Part("attention"))
    if any(hasattr(m.module, "has_relative_attention_bias") for m in attentions):
        raise DeltatuneError(
            f"prefix tuning of {type(model).__name__}: the package counts the prefix in relative positions, which are "
            "the tokens' alone here, so the outputs would differ; load it with the package `adapters`, or train it anew"
        )
    out = set(config["leave_out"])
    found: dict[str, Tensors] = {}
    for own in saved.take("prefix_tunings").values():
        for key, t in own.items():
            name, _, rest = key.partition(".")
            found.setdefault(name, {})[rest] = t
    sites: dict[str, list[Site]] = {}
    for match in attentions:
        site = Site(model, match.path, match.module, "attention")
        if _layer(model, site) not in out:
            sites.setdefault(group(site), []).append(site)
    units: list[tuple[str, Tensors]] = []
    shared: Tensors = {}
    for name, own in found.items():
        which = _PREFIX.get(name, name)
        which = which if which in sites else "encoder"  # a model of one stack has one group, whatever it is called
        units += _prefix(config, sites.pop(which, []), own, shared, which)
    if sites or not units:
        raise DeltatuneError(f"prefix tuning: no prefix for {', '.join(sites) or 'any attention'} in the file")
    p, hidden = config["prefix_length"], None if config["flat"] else config["bottleneck_size"]
    order = {m.path: i for i, m in enumerate(attentions)}
    units.sort(key=lambda unit: order[unit[0]])
    whole = len(units) == len(order)
    method = PrefixTuning(
        targets=None if whole else exact_targets(model, [path for path, _ in units]),
        length=p, hidden=hidden, dropout=config.get("dropout", 0.0),
    )  # fmt: skip
    return [Piece(method, units, shared)]


def _layer(model: Any, site: Site) -> int:
    """A decoder's layers are counted after its encoder's."""
    number = next(int(step) for step in site.path.split(".") if step.isdigit())
    return number + (anatomy.layers(model.config, "encoder") if group(site) in ("decoder", "cross") else 0)


def _prefix(
    config: Mapping[str, Any], sites: Sequence[Site], own: Tensors, shared: Tensors, which: str
) -> list[tuple[str, Tensors]]:
    """The units of one group."""
    n, p = len(sites), config["prefix_length"]
    heads, dim = geometry(sites[0]) if sites else (0, 0)
    final = own["control_trans"] if config["flat"] else own["control_trans.2.weight"]
    per, rest = divmod(final.numel() if config["flat"] else len(final), max(n, 1) * (p if config["flat"] else 1))
    if rest or per != 2 * heads * dim:
        raise DeltatuneError(
            f"prefix tuning: control_trans has shape {tuple(final.shape)}; {n} attentions with {heads} key-value heads "
            f"of width {dim} take {2 * n * heads * dim} numbers for each of the {p} places"
        )
    if config["flat"]:
        both = final.view(p, n, 2, heads, dim).permute(1, 2, 3, 0, 4)
        return [(s.path, {"source.k": k, "source.v": v}) for s, (k, v) in zip(sites, both, strict=True)]
    shared |= {f"{which}.prefix": own["wte.weight"]}
    shared |= {f"{which}.down.{x}": own[f"control_trans.0.{x}"] for x in ("weight", "bias")}
    up = {x: own[f"control_trans.2.{x}"].chunk(n) for x in ("weight", "bias")}
    return [(s.path, {f"source.up.{x}": up[x][i] for x in up}) for i, s in enumerate(sites)]


def decode_lora(config: Mapping[str, Any], saved: Saved) -> list[Piece]:
    refuse("lora", config, **_LORA)
    scales = config["composition_mode"] == "scale"
    groups: dict[tuple[int, ...] | None, dict[str, list[Tensors]]] = {}
    for where, own in saved.take("loras").items():
        path = saved.path(where)
        if odd := [n for n in own if n not in ("lora_A", "lora_B")]:
            raise DeltatuneError(f"lora: tensor {odd[0]!r} of {path} belongs to nothing that is read")
        pieces, units = _pieces(path, saved.module(path), own, config)
        groups.setdefault(pieces, {})[path] = units
    if not groups:
        raise DeltatuneError(f"lora: the file holds no tensors of {saved.name!r}")
    found: list[Piece] = []
    for pieces, members in groups.items():
        targets: Any = exact_targets(saved.model, members)
        if pieces is not None:
            targets = Fused(targets=targets, sizes=(1, 1, 1), take=pieces)
        method: Method
        if scales:
            method = IA3(targets=targets, on_input=None)
        else:
            method = LoRA(targets=targets, r=config["r"], alpha=config["alpha"], dropout=config["dropout"])
        found.append(Piece(method, [(path, unit) for path, units in members.items() for unit in units]))
    return found


def _pieces(
    path: str, module: Any, own: Tensors, config: Mapping[str, Any]
) -> tuple[tuple[int, ...] | None, list[Tensors]]:
    """Which pieces of a fused projection are adapted, None for a whole module; and the tensors of each."""
    out, in_ = layers.shape(module, "weight")
    b = own["lora_B"]
    scales, r = config["composition_mode"] == "scale", config["r"]
    k = 1 if scales else len(own["lora_A"]) // r
    if len(b) == out and k == 1:
        return None, [{"l": b.flatten()} if scales else {"a": own["lora_A"], "b": b}]
    take = tuple(i for i, x in enumerate("qkv") if x in config["attn_matrices"])
    if len(b) * 3 != out * len(take) or (not scales and k != len(take)):
        raise DeltatuneError(f"lora: lora_B {tuple(b.shape)} of {path} fits no pieces of its weight {(out, in_)}")
    bs = b.split(out // 3)
    if scales:
        return take, [{"inner.l": l.flatten()} for l in bs]
    return take, [{"inner.a": a, "inner.b": b} for a, b in zip(own["lora_A"].split(r), bs, strict=True)]


def is_unipelt(configs: Sequence[Mapping[str, Any]]) -> bool:
    """Gated, all three of them."""
    kinds = {c.get("architecture") or "bottleneck" for c in configs}
    gated = all(c.get("use_gating") for c in configs)
    return gated and len(configs) == 3 and kinds == {"prefix_tuning", "lora", "bottleneck"}


def decode_unipelt(configs: Sequence[Mapping[str, Any]], saved: Saved) -> list[Piece]:
    """One method of three. Their gates are means over all tokens, so that this is the same in encoders alone."""
    by = {c.get("architecture") or "bottleneck": c for c in configs}
    model: Any = saved.model
    found = resolve(model, Part("attention"))
    if getattr(model.config, "is_encoder_decoder", False) or any(getattr(m.module, "is_causal", False) for m in found):
        raise DeltatuneError(
            f"UniPELT: use_gating = True of a {model.config.model_type}: the package's gates are means over all tokens,"
            " later ones too, and here a decoder's are over those so far; the outputs would differ"
        )
    if left := next((n for c in configs for n in ("leave_out",) if c.get(n)), None):
        raise DeltatuneError(f"UniPELT: {left} is not read; it is about whole models here")
    warnings.warn("UniPELT: the package's gates are means over padding too, and here over tokens alone", stacklevel=2)
    (prefix,) = decode_prefix(by["prefix_tuning"], saved, **_GATED)
    refuse("lora", by["lora"], **_LORA, **_GATED)
    if sorted(by["lora"]["attn_matrices"]) != ["q", "v"] or by["lora"]["composition_mode"] != "add":
        raise DeltatuneError(f"UniPELT: attn_matrices = {by['lora']['attn_matrices']}, only ['q', 'v'] has an equal")
    gates = {saved.path(where.removesuffix(".prefix_tuning")): t for where, t in saved.take("prefix_gates").items()}
    tensors = dict(prefix.units)
    units: list[tuple[str, Tensors]] = []
    for match in found:
        units += [
            (match.path, tensors[match.path]),
            (match.path, {f"gate.{n}": t for n, t in gates[match.path].items()}),
        ]
    for where, own in saved.take("loras").items():
        unit = {"deltas.0.a": own["lora_A"], "deltas.0.b": own["lora_B"]}  # the gate stands for alpha / r there too
        units.append((saved.path(where), unit | {f"gates.0.{n}": own[f"gate.{n}"] for n in ("weight", "bias")}))
    (adapter,) = decode_bottleneck(by["bottleneck"], saved, **_GATED, non_linearity=("relu",))
    assert isinstance(prefix.method, PrefixTuning) and isinstance(adapter.method, Pfeiffer)
    method = UniPELT(
        length=prefix.method.length, hidden=prefix.method.hidden, r=by["lora"]["r"], size=adapter.method.size
    )
    return [Piece(method, units + adapter.units, prefix.shared)]
