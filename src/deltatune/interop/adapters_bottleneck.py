"""Bottleneck adapters as the package `adapters` saves them.

    <block>.<place>.adapters.<name>.adapter_down.0.weight (m, d), .bias, adapter_up.weight (d, m), .bias, [scaling]
                                    adapter_down.0.W_left (n, d/n, k), W_right (n, k, m/n), b; or W (n, d/n, m/n)
    shared_parameters.<name>.phm_rule (n, n, n)

A place is after the attention or the feed-forward sublayer. `original_ln_before` says what is read there: the output u
of the sublayer, as Houlsby's do, or its sum with the residual stream, through the norm that follows if there is one, as
Pfeiffer's; `is_parallel` the residual stream that enters the sublayer. The base's norms are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Method, Part, Site, resolve
from deltatune.core.select import walk
from deltatune.interop.peft_format_common import Piece, Tensors, exact_targets
from deltatune.methods import compacter, pfeiffer
from deltatune.methods.compacter import Compacter, PHMAdapter
from deltatune.methods.houlsby import Houlsby
from deltatune.methods.parallel import ParallelAdapter
from deltatune.methods.pfeiffer import Pfeiffer
from deltatune.models.anatomy import hidden, parts

Place = tuple[str, str]  # the block's path; "attention", "cross" or "output"
_PLACES = {"attention_adapters": "attention", "attention.output": "attention", "output_adapters": "output",
           "output": "output", "cross_attention_adapters": "cross", "SelfAttention": "attention",
           "EncDecAttention": "cross", "DenseReluDense": "output"}  # fmt: skip
_ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("original_ln_before", "is_parallel", "mh_adapter", "output_adapter", "reduction_factor"), ()),
    **dict.fromkeys(("scaling", "phm_layer", "phm_dim", "phm_rank", "factorized_phm_W", "shared_phm_rule"), ()),
    **dict.fromkeys(("phm_c_init", "phm_init_range", "hypercomplex_nonlinearity", "learn_phm"), ()),
    **dict.fromkeys(("inv_adapter_reduction_factor", "dropout", "stochastic_depth"), ()),
    **dict.fromkeys(("original_ln_after", "residual_before_ln", "phm_bias"), (True,)),
    "non_linearity": tuple(_ACTIVATIONS),
}
TRAINING = ("architecture", "init_weights", "init_weights_seed", "leave_out")  # leave_out: the tensors tell


class Saved:
    """The tensors of a file, taken out by what they belong to; what is left over is an error."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
        self.model, self.name, self.left = model, name, dict(tensors)
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."  # which a bare backbone's keys are without
        self.modules = {path.removeprefix(self.prefix): path for path, _ in walk(model)}
        self._blocks = [m.path.removeprefix(self.prefix) for m in resolve(model, Part("block"))]

    def take(self, kind: str) -> dict[str, Tensors]:
        """Where -> the tensors there, of `<where>.<kind>.<name>.<tensor>`."""
        mark, found = f"{kind}.{self.name}.", dict[str, Tensors]()
        for key in list(self.left):
            where, at, rest = f".{key}".partition(f".{mark}")
            if at:
                found.setdefault(where[1:].removeprefix(self.prefix), {})[rest] = self.left.pop(key)
        return found

    def path(self, where: str) -> str:
        if where not in self.modules:
            raise DeltatuneError(f"{type(self.model).__name__} has no module {where!r}, which the adapter is for")
        return self.modules[where]

    def module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def place(self, where: str) -> Place:
        block = next((b for b in self._blocks if where.startswith(f"{b}.")), None)
        rest = where.removeprefix(f"{block}.")
        if f"{block}.{rest}" in self.modules and rest.startswith("layer."):  # T5's sublayers have numbers
            rest = next((n for n in _PLACES if f"{where}.{n}" in self.modules), rest)
        if block is None or rest not in _PLACES:
            raise DeltatuneError(f"an adapter at {where!r}: {type(self.model).__name__} has no such place")
        return self.modules[block], _PLACES[rest]


def refuse(kind: str, config: Mapping[str, Any], **only: tuple[Any, ...]) -> None:
    """Raises for a field with a value that changes the outputs in a way that is not read. Those of `only` have one of
    the values; others are off. `TRAINING`, and fields of `only` with no value given, may have any."""
    for name, value in config.items():
        allowed = only.get(name, () if name in TRAINING else (None, False, 0))
        if allowed and value not in allowed and value not in ([], {}):
            told = " or ".join(map(repr, allowed))
            raise DeltatuneError(
                f"{kind}: {name} = {value!r} has no equal here, only {told}; load it with the package `adapters`, "
                "or train it anew"
            )


def decode_bottleneck(config: Mapping[str, Any], saved: Saved, **more: tuple[Any, ...]) -> list[Piece]:
    """As few methods as there are ways to be placed and sizes."""
    refuse("adapter", config, **(_FIELDS | more))
    wanted = {p for p, flag in (("attention", "mh_adapter"), ("output", "output_adapter")) if config[flag]}
    found = {saved.place(where): t for where, t in saved.take("adapters").items()}
    if odd := next((part for _, part in found if part not in wanted), None):
        raise DeltatuneError(f"adapter: it has tensors after {odd} sublayers, which its configuration leaves out")
    rules = {n: t for own in saved.take("shared_parameters").values() for n, t in own.items()}
    groups: dict[tuple[str, int], list[tuple[str, Tensors]]] = {}
    for place, own in found.items():
        path, kind = stands(saved.model, place, config)
        size = len(own["adapter_down.0.b" if config["phm_layer"] else "adapter_down.0.bias"])
        groups.setdefault((kind, size), []).append((path, own))
    if not groups:
        raise DeltatuneError(f"adapter: the file holds no tensors of {saved.name!r}")
    return [_piece(saved.model, kind, size, own, config, rules) for (kind, size), own in groups.items()]


def stands(model: nn.Module, place: Place, config: Mapping[str, Any]) -> tuple[str, str]:
    """(path of the module, "parallel", "output" or "sum") of one adapter."""
    block, part = place
    found = parts(model)
    inside = f"{block}."
    if config["is_parallel"]:
        if part != "output" or config["original_ln_before"]:
            raise DeltatuneError(
                "adapter: is_parallel = True is read beside the feed-forward sublayer alone: mh_adapter = False, "
                "original_ln_before = False"
            )
        return _one(model, Part("down"), inside), "parallel"
    if not config["original_ln_before"]:
        if part == "output":
            return _one(model, Part("down"), inside), "output"
        crossed = _paths(model, Part("cross_attention")) if "cross_attention" in found else []
        return _one(model, Part("o"), inside, tuple(f"{p}." for p in crossed)), "output"
    if part == "output":
        return (_one(model, Part("post_norm"), inside) if "post_norm" in found else block), "sum"
    norms = [p for p in _paths(model, Part("norm")) if p.startswith(inside) and _after_attention(p)]
    if "post_norm" not in found or len(norms) != 1:
        raise DeltatuneError(
            "adapter: original_ln_before = True with mh_adapter = True: no module of this model makes the sum after "
            "attention, where the adapter would stand; original_ln_before = False is read"
        )
    return norms[0], "sum"


def _after_attention(path: str) -> bool:
    return path.endswith(("attention.output.LayerNorm", "self_attn_layer_norm", "sa_layer_norm"))


def _paths(model: nn.Module, select: Any) -> list[str]:
    return [m.path for m in resolve(model, select)]


def _one(model: nn.Module, select: Any, inside: str, outside: tuple[str, ...] = ()) -> str:
    found = dict.fromkeys(p for p in _paths(model, select) if p.startswith(inside))
    ours = [p for p in found if not (outside and p.startswith(outside))]
    if len(ours) != 1:
        raise DeltatuneError(f"adapter: {inside}: there is no one {select.names} to stand at: {', '.join(ours)}")
    return ours[0]


def _piece(
    model: nn.Module, kind: str, size: int, found: list[tuple[str, Tensors]], config: Mapping[str, Any], rules: Tensors
) -> Piece:
    targets = exact_targets(model, [path for path, _ in found])
    activation = _ACTIVATIONS[config["non_linearity"]]
    scale = config["scaling"]
    fixed = isinstance(scale, (int, float))
    if config["phm_layer"]:
        return _phm(kind, size, targets, found, config, rules)
    if kind == "output":
        method: Method = Houlsby(targets=targets, size=size, norms=None, activation=activation)
    elif kind == "sum":
        method = Pfeiffer(targets=targets, size=size, activation=activation)
    else:
        factor = scale if scale == "learned" else float(scale) if fixed else 1.0
        method = ParallelAdapter(targets=targets, size=size, scale=factor, activation=activation)
    units: list[tuple[str, Tensors]] = []
    for path, own in found:
        t = _dense(own)
        s: Any = own.get("scaling", torch.tensor(float(scale)) if fixed else None)  # (1,) or (d,)
        if kind != "parallel" or scale == "channel":
            t |= {"up": s.reshape(-1, 1) * t["up"], "up_bias": s * t["up_bias"]}
        elif not fixed:
            t["s"] = s.reshape(())
        units.append((path, t))
    if kind == "parallel":  # what it reads from has units without tensors
        units += [(m.path, {}) for m in resolve(model, method.select(model)[1])]  # type: ignore[index]
    return Piece(method, units)


def _dense(own: Tensors) -> Tensors:
    names = {"adapter_down.0.weight": "down", "adapter_down.0.bias": "down_bias"}
    names |= {"adapter_up.weight": "up", "adapter_up.bias": "up_bias"}
    names |= {n: n for n in own if n.startswith("gate.")}  # UniPELT's
    if odd := [n for n in own if n not in (*names, "scaling")]:
        raise DeltatuneError(f"adapter: tensor {odd[0]!r} belongs to nothing that is read")
    return {ours: own[theirs] for theirs, ours in names.items()}


def _phm(
    kind: str, size: int, targets: Any, found: list[tuple[str, Tensors]], config: Mapping[str, Any], rules: Tensors
) -> Piece:
    low_rank = bool(config["factorized_phm_W"])
    fields = {
        n: config[n] for n in ("factorized_phm_W", "shared_phm_rule", "original_ln_before", "is_parallel", "scaling")
    }
    equal = low_rank == bool(fields["shared_phm_rule"]) and kind in (("output", "sum") if low_rank else ("output",))
    if not equal or fields["scaling"] != 1:
        told = ", ".join(f"{n} = {v!r}" for n, v in fields.items())
        raise DeltatuneError(
            f"adapter: phm_layer = True with {told} has no equal here, only Compacter's, True, True, either, False, "
            "1.0, and a PHM adapter's, False, False, False, False, 1.0; load it with the package `adapters`, or train "
            "it anew"
        )
    names = {"bias": "b"} | ({"s": "W_left", "t": "W_right"} if low_rank else {"b": "W", "rules.a": "phm_rule"})
    sides = {"down": "adapter_down.0", "up": "adapter_up"}
    ours = {f"{layer}.{n}": f"{theirs}.{name}" for layer, theirs in sides.items() for n, name in names.items()}
    inside = "inner." if kind == "sum" else ""
    units = [(path, {f"{inside}{n}": own[name] for n, name in ours.items()}) for path, own in found]
    options: dict[str, Any] = {"targets": targets, "size": size, "n": config["phm_dim"], "norms": None}
    options["activation"] = _ACTIVATIONS[config["non_linearity"]]
    if not low_rank:
        return Piece(PHMAdapter(**options), units)
    if "phm_rule" not in rules:
        raise DeltatuneError(
            "adapter: the file holds no phm_rule, which shared_phm_rule = True needs: the package leaves it out "
            "of what it saves from T5ForConditionalGeneration; add it to the file as shared_parameters.<name>.phm_rule"
        )
    cls = CompacterAfterSum if kind == "sum" else Compacter
    return Piece(cls(**options, k=config["phm_rank"]), units, {"a": rules["phm_rule"]})


@dataclass(frozen=True, kw_only=True)
class CompacterAfterSum(Compacter):
    """Compacter++ as the package places it: where `Pfeiffer`'s adapters stand."""

    usual = ("post_norm",)

    def build(self, site: Site, shared: nn.Module | None) -> Any:
        norm = isinstance(getattr(site.module, "weight", None), Tensor)
        d = site.shape.out if norm else hidden(site.config)
        down, up = (self.layer(site, *shape, shared) for shape in ((d, self.size), (self.size, d)))
        return (PHMAtNorm if norm else PHMAtBlock)(compacter.Bottleneck(self.activation, down, up))


class _PHM(pfeiffer.Bottleneck):
    roles = {}

    def __init__(self, inner: compacter.Bottleneck) -> None:
        nn.Module.__init__(self)
        self.inner = inner

    def core(self, x: Tensor) -> Tensor:
        own = self.inner
        return own.up(own.activation(own.down(x.to(own.down.bias.dtype)))).to(x.dtype)


class PHMAtNorm(_PHM, pfeiffer.AtNorm): ...


class PHMAtBlock(_PHM, pfeiffer.AtBlock): ...
