"""What a PEFT file holds beside the adapter: whole modules (`modules_to_save`), biases, embeddings, single tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import Delta, DeltatuneError, Method
from deltatune.core.select import walk
from deltatune.interop.peft_format_common import (
    HEADS,
    Fields,
    Piece,
    Placed,
    Stored,
    Tensors,
    exact_targets,
    frozen,
    read_like,
    stored_like,
)
from deltatune.methods.bitfit import BitFit
from deltatune.methods.tune import Tune, head_of
from deltatune.models.anatomy import ANATOMY, classifier
from deltatune.storage import layers

Copies = dict[str, dict[str, Tensor]]  # module path -> parameter -> its value in the module's own layout


def copies_of(places: Iterable[Placed]) -> Copies | None:
    """The parameters that `Tune` and `BitFit` hold; None if a quantised module is among them."""
    found: Copies = {}
    for place in places:
        for unit, at in place.units:
            if layers.is_quantised(place.module) or not isinstance(unit, Delta):
                return None
            before = found.setdefault(place.path, {}).get(at)
            w = frozen(place.module, at) if before is None else read_like(place.module, at, before)
            found[place.path][at] = stored_like(place.module, at, unit.weight(w).detach())
    return found


def encode_saved(
    model: nn.Module, copies: Copies, adapted: set[str], task: str | None, biases: bool, by_task: bool
) -> tuple[Fields, Tensors, str | None] | None:
    """(fields, tensors, task) for these copies; `biases`: whether the method's configuration has a field for them.

    A classification task makes PEFT save the head whole, so a model whose head is not trained is given no task, but
    where PEFT goes by it (`by_task`) to know how the base is called.
    """
    for chosen in (task, None) if task in HEADS and not by_task else (task,):
        names = _names(model, copies, chosen)
        wrapped = _wrapped((path for path, _ in walk(model)), names)
        if chosen in HEADS and not by_task and not any(_within(p, wrapped) for p in copies):
            continue
        if any(_within(p, wrapped) for p in adapted) or any(p in adapted and "weight" in v for p, v in copies.items()):
            continue
        tensors: Tensors = {}
        for root in wrapped:
            for path, module in walk(model):
                if _within(path, {root}):
                    if layers.is_quantised(module):
                        return None
                    tensors |= {f"{path}.{n}": copies.get(path, {}).get(n, t) for n, t in _state(module).items()}
        rest = {path: own for path, own in copies.items() if not _within(path, wrapped)}
        if rest and not biases:
            return None
        tensors |= {f"{p}{'.base_layer' if p in adapted else ''}.bias": own["bias"] for p, own in rest.items()}
        fields: Fields = {"modules_to_save": sorted(names) or None}
        if biases:
            fields["bias"] = "all" if rest else "none"
        return fields, tensors, chosen
    return None


def _names(model: nn.Module, copies: Copies, task: str | None) -> set[str]:
    """What `modules_to_save` must hold; none of its members lies in another."""
    names = {path for path, own in copies.items() if "weight" in own}
    names |= {head for head in HEADS.get(task or "", ()) if any(path.endswith(head) for path, _ in walk(model))}
    return {n for n in names if not any(n.startswith(f"{other}.") for other in names)}


def _wrapped(paths: Iterable[str], names: Iterable[str]) -> set[str]:
    """The modules that PEFT replaces by a copy: those whose path ends in one of the names, even within a word."""
    ending = tuple(names)
    return {p for p in paths if ending and p.endswith(ending)}


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _state(module: nn.Module) -> Tensors:
    """The parameters and persistent buffers of the module itself."""
    kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    return {n: t.detach() for n, t in {**module._parameters, **kept}.items() if t is not None}


def decode_saved(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> tuple[list[Piece], list[Piece]]:
    """(inside, beside): values of the base itself, on which the adapter acts, and the copies of whole modules.

    What PEFT wrote although it is the base's own is passed over.
    """
    inside = _tokens(model, config, stored)
    labels = tuple(config.get("deltatune", {}).get("labels") or ())
    head = head_of(model, labels) if labels else classifier(model) if _is_known(model) else None
    beside: Copies = {}
    saved = _wrapped(stored.canonical, config.get("modules_to_save") or ())
    for key, value in list(stored.left.items()):
        name, _, param = key.rpartition(".")
        if name.endswith(".original_module") or ".original_module." in name:
            del stored.left[key]  # the base's own
            continue
        name = name.replace(".base_layer", "").replace(".modules_to_save", "").replace(".default", "")
        if name not in stored.canonical:
            continue
        del stored.left[key]
        path = stored.canonical[name]
        module: Any = stored.modules[path]
        own: Any = getattr(module, param, None)
        task = path == head and _within(name, saved) and isinstance(own, Tensor) and own.shape[1:] == value.shape[1:]
        if task and not labels and own.shape != value.shape:  # PEFT does not say what they are called
            labels = tuple(f"LABEL_{i}" for i in range(len(value)))
        if not isinstance(own, Tensor) or not (own.shape == value.shape or task or layers.is_quantised(module)):
            shape = tuple(own.shape) if isinstance(own, Tensor) else "none"
            raise DeltatuneError(
                f"tensor {key!r} has shape {tuple(value.shape)}, the model's is {shape}; "
                "if its vocabulary was extended, call `model.resize_token_embeddings` first"
            )
        same = own.shape == value.shape and torch.equal(own.detach(), value.to(own))  # in the base's precision
        if _within(name, saved) and param in ("weight", "bias"):
            beside.setdefault(path, {})[param] = value
        elif not same and param in ("weight", "bias"):
            for other in _sharing(stored, own, param):
                inside.setdefault(other, {})[param] = value
        elif not same:
            raise DeltatuneError(f"tensor {key!r}: only weights and biases of whole modules are read, not {param!r}")
    if stored.left:
        key = next(iter(stored.left))
        stored.path(key.rpartition(".")[0], key)
        raise DeltatuneError(f"tensor {key!r} belongs to nothing that {config.get('peft_type')} is known to hold")
    return _pieces(model, stored, inside), _pieces(model, stored, beside, labels if head in beside else ())


def _is_known(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) in ANATOMY


def _sharing(stored: Stored, own: Tensor, param: str) -> list[str]:
    """Where a parameter is used: PEFT writes into it, so what is tied to it follows."""
    return [path for path, module in stored.modules.items() if module._parameters.get(param) is own]


def _tokens(model: Any, config: Mapping[str, Any], stored: Stored) -> Copies:
    """Single rows of embeddings that were trained, as copies of them. What is tied follows the model's input embedding
    alone, as in PEFT; of a tied head PEFT 0.21.2 leaves the bias out, which is kept here."""
    found: Copies = {}
    tied: Copies = {}
    indices = config.get("trainable_token_indices") or config.get("token_indices")
    for path, rows in stored.take("token_adapter.trainable_tokens_delta", "trainable_tokens_delta").items():
        named = indices.items() if isinstance(indices, Mapping) else [(path, indices)]
        at = next((v for n, v in named if f".{path}".endswith(f".{n}")), None)
        if at is None or len(at) != len(rows):
            raise DeltatuneError(f"{path}: token indices {indices!r} do not name its {len(rows)} trained rows")
        own = stored.modules[path].weight
        value = frozen(stored.modules[path], "weight").to(rows.dtype, copy=True)
        value[torch.tensor(at)] = rows
        found[path] = {"weight": value}
        if getattr(model, "get_input_embeddings", lambda: None)() is stored.modules[path]:
            tied = {other: {"weight": value} for other in _sharing(stored, own, "weight")}  # type: ignore[arg-type]
    return tied | found


def _pieces(model: nn.Module, stored: Stored, copies: Copies, labels: tuple[str, ...] = ()) -> list[Piece]:
    order = {path: i for i, path in enumerate(stored.modules)}
    whole = sorted((p for p, own in copies.items() if "weight" in own), key=order.__getitem__)
    biases = sorted((p for p in copies if p not in whole), key=order.__getitem__)
    made: list[tuple[list[str], type[Method], tuple[str, ...]]] = [
        (whole, Tune, ("weight", "bias")),
        (biases, BitFit, ("bias",)),
    ]
    found = []
    for paths, cls, params in made:
        units: list[tuple[str, Tensors]] = []
        for path in paths:
            module = stored.modules[path]
            for param in params:
                if isinstance(own := getattr(module, param, None), Tensor):
                    value = copies[path].get(param, own.detach())
                    units.append((path, {"v": read_like(module, param, value)}))
        if paths:
            targets = exact_targets(model, paths)
            found.append(Piece(Tune(targets=targets, labels=labels) if cls is Tune else cls(targets=targets), units))
    return found
