"""Adapters saved by the package `adapters` of AdapterHub, 1.3, read: `model.save_adapter(folder, name)`.

    adapter_config.json             what it is: a configuration, or several in a union
    adapter.safetensors             its tensors, as `use_safetensors=True` saves them
    head_config.json, model_head.safetensors                    a head that was trained beside it
    adapter_fusion_config.json, model_adapter_fusion.safetensors        what `save_adapter_fusion` writes instead:
        <block>.<place>.adapter_fusion_layer.<names>.query.weight (d, d), .bias, key.weight, .bias, value.weight

    double_seq_bn -> Houlsby          par_bn, scaled_par_bn -> ParallelAdapter        lora, ia3 -> LoRA, IA3
    seq_bn -> Pfeiffer                compacter, compacter++ -> Compacter             unipelt -> UniPELT
    prefix_tuning -> PrefixTuning     mam -> a Union of the two that it is made of    a fusion -> AdapterFusion

`dt.load(model, folder)` reads them too. A fusion finds the adapters that it fuses on the model, or in folders of their
names beside its own. A field that would change the outputs in a way that is not here is refused, by name and value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatune.core import Adapter, DeltatuneError, Method, adapters
from deltatune.core import load as core_load
from deltatune.core.checkpoint import register_decoder, register_reader
from deltatune.core.errors import nearest
from deltatune.interop.adapters_attention import decode_lora, decode_prefix, decode_unipelt, is_unipelt
from deltatune.interop.adapters_bottleneck import Place, Saved, decode_bottleneck, refuse, stands
from deltatune.interop.peft_format_common import Piece, Tensors, assemble, exact_targets, read_like
from deltatune.methods.adapter_fusion import AdapterFusion
from deltatune.methods.trained import Trained
from deltatune.methods.tune import Tune

FORMAT = "adapters"  # the key of a configuration that says so
_FUSION = "adapter_fusion_config.json"
_FILES = {  # configuration: tensors, their pickle
    "adapter_config.json": ("adapter.safetensors", "pytorch_adapter.bin"),
    _FUSION: ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin"),
}
_HEAD = ("model_head.safetensors", "pytorch_model_head.bin")
_BESIDE = "model_head:"  # before the names of a head's tensors
_FUSED: dict[str, tuple[Any, ...]] = (
    dict.fromkeys(("key", "query", "value"), (True,))
    | dict.fromkeys(("regularization", "value_initialized", "dropout_prob"), ())
    | {"value_before_softmax": (True,)}
)
_DECODE: dict[str, Callable[[Mapping[str, Any], Saved], list[Piece]]] = {
    "bottleneck": decode_bottleneck,
    "prefix_tuning": decode_prefix,
    "lora": decode_lora,
}


def load(model: nn.Module, folder: str | Path, name: str | None = None, *, dtype: torch.dtype | None = None) -> Adapter:
    """Attach the adapter that the package `adapters` saved in `folder`, and activate it.

    Raises DeltatuneError, and leaves the model as it was, when the folder holds none, or one that does not fit.
    """
    if not any((Path(folder) / file).is_file() and _is_theirs(_json(Path(folder) / file)) for file in _FILES):
        raise DeltatuneError(f"{folder}: no {' or '.join(_FILES)} of the package `adapters` there")
    return core_load(model, folder, name, dtype=dtype)


def read(folder: Path) -> tuple[dict[str, Any], Tensors] | None:
    """The configuration and the tensors of a folder of this format; None for another's."""
    for file, names in _FILES.items():
        if not (folder / file).is_file() or not _is_theirs(config := _json(folder / file)):
            continue
        tensors = _tensors(folder, *names)
        if not tensors:
            raise DeltatuneError(f"{folder}: {names[0]} is missing")
        tensors |= {f"{_BESIDE}{key}": t for key, t in _tensors(folder, *_HEAD).items()}
        name = str(config["name"]).replace(".", "-").replace(",", "+")
        own = {**config, "folder": str(folder), "fuses": file == _FUSION}
        return {FORMAT: own, "deltatune": {"name": name}}, tensors
    return None


def _is_theirs(config: Mapping[str, Any]) -> bool:
    return {"config", "name", "model_type"} <= set(config) and "peft_type" not in config


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise DeltatuneError(f"{file}: not valid JSON ({e})") from e


def _tensors(folder: Path, name: str, pickle: str) -> Tensors:
    if (folder / name).is_file():
        try:
            return load_file(folder / name)
        except SafetensorError as e:
            raise DeltatuneError(f"{folder / name}: damaged ({e})") from e
    if (folder / pickle).is_file():
        raise DeltatuneError(
            f"{folder / pickle}: files that need unpickling are not read; save it with `use_safetensors=True`, or, as "
            "that fails for prefixes, write its tensors yourself: save_file({k: t.clone() for k, t in torch.load(file, "
            f"weights_only=True).items()}}, {name!r})"
        )
    return {}


def decode(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Method, Tensors]:
    """The method and its tensors, by our names."""
    own, kind = config[FORMAT], getattr(getattr(model, "config", None), "model_type", None)
    if own["model_type"] != kind:
        raise DeltatuneError(f"the adapter is for model type {own['model_type']!r}, and this model is a {kind!r}")
    head = {key.removeprefix(_BESIDE): t for key, t in tensors.items() if key.startswith(_BESIDE)}
    saved = Saved(model, {key: t for key, t in tensors.items() if not key.startswith(_BESIDE)}, own["name"])
    inner = own["config"]
    if not isinstance(inner, Mapping):
        raise DeltatuneError(f"config = {inner!r}: a name alone, as versions before 1.0 wrote; save it with 1.3 again")
    if own["fuses"]:
        pieces = _fusion(inner, saved, Path(own["folder"]))
    else:
        pieces = _pieces(inner, saved)
    if saved.left:
        raise DeltatuneError(f"tensor {next(iter(saved.left))!r} belongs to nothing that is read")
    return assemble([*pieces, *_head(saved, head)])


def _pieces(config: Mapping[str, Any], saved: Saved) -> list[Piece]:
    configs = list(config["configs"]) if config.get("architecture") == "union" else [config]
    if is_unipelt(configs):
        return decode_unipelt(configs, saved)
    found: list[Piece] = []
    for one in configs:
        kind = one.get("architecture") or "bottleneck"
        if kind not in _DECODE:
            known = ", ".join(_DECODE)
            raise DeltatuneError(f"architecture {kind!r} is not read{nearest(kind, _DECODE)} (read: {known})")
        found += _DECODE[kind](one, saved)
    return found


def _head(saved: Saved, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Copies of the modules of the model's own head; what is the base's is passed over."""
    found: dict[str, Tensors] = {}
    others: list[str] = []
    for key, t in tensors.items():
        where, _, param = key.rpartition(".")
        path = saved.modules.get(where.removeprefix(saved.prefix))
        own: Any = None if path is None else getattr(saved.module(path), param, None)
        if path is None or not isinstance(own, Tensor) or own.shape != t.shape:
            others.append(key)
        elif not torch.equal(own.detach(), t.to(own)):
            found.setdefault(path, {})[param] = t
    if others:
        raise DeltatuneError(
            f"the head's {others[0]!r} is no part of {type(saved.model).__name__}; load the base with the head that "
            "was trained, or remove model_head.safetensors to read the adapter without"
        )
    if not found:
        return []
    units: list[tuple[str, Tensors]] = []
    for path in (p for p in saved.modules.values() if p in found):
        module = saved.module(path)
        for param in ("weight", "bias"):
            if isinstance(own := getattr(module, param, None), Tensor):
                units.append((path, {"v": read_like(module, param, found[path].get(param, own.detach()))}))
    return [Piece(Tune(targets=exact_targets(saved.model, found)), units)]


def _among(model: nn.Module, place: Place, paths: Sequence[str]) -> str:
    """Which of the modules is at this place, whatever is read there."""
    for before in (False, True):
        with suppress(DeltatuneError):
            path, _ = stands(model, place, {"is_parallel": False, "original_ln_before": before})
            if path in paths:
                return path
    raise DeltatuneError(f"fusion: the adapters that it fuses have none after {place[1]} of {place[0]}")


def _fusion(config: Mapping[str, Any], saved: Saved, folder: Path) -> list[Piece]:
    """The adapters are those on the model, or in folders beside this one."""
    refuse("fusion", config, **_FUSED)
    names = saved.name.split(",")
    found = []
    for name in names:
        near = folder.parent / name
        if name not in adapters(saved.model) and not near.is_dir():
            raise DeltatuneError(f"fusion: adapter {name!r} is neither on the model nor in {near}; load it first")
        found.append(Trained.find(saved.model, name if name in adapters(saved.model) else str(near)))
    units: dict[str, Tensors] = {}
    paths = found[0].paths(saved.model)
    for where, own in saved.take("adapter_fusion_layer").items():
        path = _among(saved.model, saved.place(where), paths)
        t = {f"attention.{n}": own[f"{n}.weight"] for n in ("query", "key", "value")}
        t |= {f"attention.{n}_bias": own[f"{n}.bias"] for n in ("query", "key")}
        for i, adapter in enumerate(found):
            mine = {k: v for k, v in (adapter.state or {}).items() if k.startswith(f"{path}.0.")}
            t |= {f"adapters.{i}.{k.removeprefix(f'{path}.0.')}": v for k, v in mine.items()}
        units[path] = t
    method = AdapterFusion(adapters=tuple(t.name for t in found), dropout=config.get("dropout_prob") or 0.0)
    return [Piece(method, list(units.items()))]


register_reader(read)
register_decoder(decode, lambda config: FORMAT in config)
