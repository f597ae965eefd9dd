"""What all methods in PEFT's on-disk layout share: keys, module paths, and how pieces become one method."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Intervention, Method, Union, resolve
from deltatune.core.method import matching
from deltatune.core.select import SLOT, walk
from deltatune.storage import layers

PREFIX, WRAPPER = "base_model.model.", "base_model."
VERSION = "0.21.2"  # of PEFT, whose layout this is
Fields = dict[str, Any]
Tensors = dict[str, Tensor]

HEADS = {  # what PEFT saves whole whenever the task is this one
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass
class Placed:
    """A module of the base and the units that an adapter has there, as (unit, place)."""

    path: str
    module: Any
    units: list[tuple[Intervention, str]]


@dataclass
class Piece:
    """A method with its units' tensors, in the order in which `attach` will build them, and those that all share."""

    method: Method
    units: list[tuple[str, Tensors]]
    shared: Tensors = field(default_factory=dict)


def assemble(pieces: Sequence[Piece]) -> tuple[Method, Tensors]:
    """One method, and the tensors under the names of `Adapter.state_dict`; the first piece is innermost."""
    tensors: Tensors = {}
    number: dict[str, int] = {}
    part = 0
    for piece in pieces:
        tensors |= {f"shared.{part}.{name}": t for name, t in piece.shared.items()}
        part += len(piece.method.parts())
        for path, own in piece.units:
            i = number[path] = number.get(path, -1) + 1
            tensors |= {f"{path}.{i}.{name}".lstrip("."): t for name, t in own.items()}
    methods = tuple(p.method for p in pieces)
    return (methods[0] if len(methods) == 1 else Union(methods=methods)), tensors


def _aliases(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every name of every module of the base, a shared one's too; adapters, of which there may be thousands, are not
    entered."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != SLOT:
            yield from _aliases(child, f"{path}.{name}".lstrip("."))


class Stored:
    """The tensors of a file, taken out by the name that ends their key; what is left over is an error."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], prefix: str = PREFIX) -> None:
        self.modules = dict(walk(model))
        by_module = {module: path for path, module in self.modules.items()}
        self.canonical = {alias: by_module[module] for alias, module in _aliases(model)}
        self.left = {key.removeprefix(prefix): t for key, t in tensors.items()}
        self._model = model

    def take(self, *names: str) -> Tensors:
        """Module path -> tensor, of the keys that end in one of `names`."""
        found: Tensors = {}
        for key in list(self.left):
            for name in names:
                if key.endswith(f".{name}"):
                    found[self.path(key.removesuffix(f".{name}"), key)] = self.left.pop(key)
                    break
        return found

    def path(self, name: str, key: str) -> str:
        if name not in self.canonical:
            near = difflib.get_close_matches(name, self.canonical, 1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DeltatuneError(f"tensor {key!r}: {type(self._model).__name__} has no module {name!r}{hint}")
        return self.canonical[name]


def exact_targets(model: nn.Module, paths: Iterable[str]) -> str | tuple[str, ...]:
    """A selection of exactly these modules: bare names where these suffice, else whole paths."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[2], []).append(path)
    found: list[str] = []
    for name, members in groups.items():
        if re.fullmatch(r"\w+", name) and {m.path for m in resolve(model, name)} == set(members):
            found.append(name)
        else:
            found += [re.escape(p) if "." in p else f"({re.escape(p)})" for p in members]
    return found[0] if len(found) == 1 else tuple(found)


Encode = Callable[[nn.Module, Sequence[Method], Sequence[Placed]], tuple[Fields, Tensors] | None]
Decode = Callable[[nn.Module, Mapping[str, Any], Stored], Piece]


@dataclass(frozen=True)
class Kind:
    """A `peft_type`: the methods that are written as it, how it is written and read, and its configuration's fields."""

    name: str
    methods: tuple[type[Method], ...]
    encode: Encode
    decode: Decode
    fields: Fields
    wide: tuple[str, ...] = ()  # tensors that are the adapter's and no module's


def grouped(model: nn.Module, found: Mapping[Any, list[tuple[str, Tensors]]], cls: type[Method]) -> Piece:
    """`found`: units by the options of their method; several methods become a union."""
    made = [cls(targets=exact_targets(model, [p for p, _ in units]), **dict(key)) for key, units in found.items()]
    method = made[0] if len(made) == 1 else Union(methods=tuple(made))
    return Piece(method, [unit for units in found.values() for unit in units])


def whole(x: float) -> float:
    """alpha = s r is a whole number but for rounding when alpha was one, and PEFT declares it as one."""
    return round(x) if abs(x - round(x)) <= 1e-9 * max(1.0, abs(x)) else x


def pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the others by the path of their module."""
    usual = Counter(values.values()).most_common(1)[0][0]
    rest = {path: v for path, v in values.items() if v != usual}
    if all(matching(rest, path, usual) == v for path, v in values.items()):
        return usual, rest
    return usual, {f"^{path}": v for path, v in rest.items()}  # where one path is the ending of another


def is_transposed(module: nn.Module) -> bool:
    return layers.layer_of(module).transposed


def common_fields(model: nn.Module, peft_type: str, task: str | None) -> Fields:
    """The fields of every PEFT configuration."""
    cls = layers.plain_class(type(model))
    auto = {"base_model_class": cls.__name__, "parent_library": cls.__module__} if task is None else None
    return {
        "peft_type": peft_type,
        "task_type": task,
        "auto_mapping": auto,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "peft_version": VERSION,
        "revision": None,
    }


def task_of(model: nn.Module) -> str | None:
    """PEFT's task for a model with a head, by the name of its class; None for others."""
    name = layers.plain_class(type(model)).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def stored_like(module: nn.Module, param: str, w: Tensor) -> Tensor:
    """`w`, (out, in), in the module's own layout."""
    own = getattr(module, param)
    if is_transposed(module) and w.ndim == 2:
        return w.T.reshape(own.shape)
    return w.reshape(-1, *own.shape[1:])  # with as many rows as it has: a head may tell other classes apart


def read_like(module: nn.Module, param: str, w: Tensor) -> Tensor:
    """A tensor in the module's own layout as (out, in), a vector as it is."""
    if is_transposed(module) and w.ndim == 2:
        return w.T
    return w.flatten(1) if w.ndim > 2 else w


def frozen(module: nn.Module, param: str) -> Tensor:
    """The base's parameter as methods see it, detached."""
    with torch.no_grad():
        return layers.read(module, param).detach()
