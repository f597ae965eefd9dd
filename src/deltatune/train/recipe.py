"""A run in one YAML file: `Recipe`. Unknown keys are refused with the nearest name; every field can be overridden."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltatune.core import Callback, Config, DeltatuneError, Method, Union, nearest
from deltatune.core.adapter import write_atomically
from deltatune.data.encode import Task, TooLong
from deltatune.data.templates import TrainOn
from deltatune.models.quantise import Quantise
from deltatune.registry import make, named
from deltatune.train.options import TrainOptions

FULL = "full"  # the method that trains the base itself
Spec = str | dict[str, Any]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(BaseModel):
    """What to train on. `train` and `eval` are files, `datasets` folders or hub names."""

    model_config = _STRICT

    train: str
    eval: str | int | None = None
    """A file; or how many rows of `train` to hold out: a number, or a share such as 5%."""
    format: str | None = None
    columns: dict[str, str] | None = None
    """Which column holds a field of the format: {text: question}."""
    split: str | None = None
    template: str | None = None
    """chat, human-assistant, alpaca or a Jinja file; by default the tokenizer's own."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """The longest row in tokens; 1024 or, if that is less, what the base can read."""
    too_long: TooLong = "truncate"
    train_on: TrainOn = "response"
    packing: bool | None = None
    """Several rows in one, apart from one another; by default if base and method allow it and steps count tokens."""


class Recipe(BaseModel):
    """A run, as a recipe file says. Relative paths are those of the working folder."""

    model_config = _STRICT

    version: Literal[1] = 1
    base: str
    quantize: Quantise | None = None
    """How the base's linear layers are stored: nf4 or int8 (bitsandbytes), torchao-int8 or torchao-int4."""
    data: Data
    task: Task | None = None
    """By default what rows and base are for: classes, tags, or text (seq2seq from an encoder-decoder, else causal)."""
    method: Spec | list[Spec] = "lora"
    """A name, `{name: …, option: value}`, a list of these (a union), or `full`: every weight of the base."""
    callbacks: list[Spec] = []
    train: TrainOptions = TrainOptions()
    output: str = "runs/default"
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        """`data: rows.jsonl` is `data: {train: rows.jsonl}`; there is one seed, and the options have it too."""
        if not isinstance(given, dict):
            return given
        train, seed = given.get("train") or {}, given.get("seed", 0)
        if isinstance(train, dict):
            if "seed" in train:
                raise ValueError("train.seed: there is one seed for all, at the top of the recipe: seed")
            train = TrainOptions(**train, **({"seed": seed} if isinstance(seed, int) else {}))
        data = given.get("data")
        short = {"data": {"train": data}} if isinstance(data, str) else {}
        return {**given, **short, "train": train}

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file, with `key=value` overrides. Raises DeltatuneError with file, key and remedy."""
        file = Path(path).expanduser()
        if not file.is_file():
            near = nearest(file.name, [p.name for p in file.parent.glob("*.y*ml")]) if file.parent.is_dir() else ""
            raise DeltatuneError(f"{path}: there is no such recipe{near}")
        try:
            given = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DeltatuneError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise DeltatuneError(f"{path}: a recipe is a mapping with the keys {', '.join(cls.model_fields)}")
        for override in overrides:
            _override(given, override)
        return cls.of({"output": f"runs/{file.stem}", **given}, str(path))

    @classmethod
    def of(cls, given: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """The recipe that a mapping, as read from YAML, says; methods and callbacks are made once, to check them."""
        try:
            recipe = cls.model_validate(dict(given))
            if recipe.made_method() is None and recipe.quantize is not None:
                raise DeltatuneError("quantize: method full trains the weights, which must not be quantised; drop it")
            recipe.made_callbacks()
            recipe = recipe.model_copy(update={"train": recipe.train.rated(recipe.made_method())})
        except ValidationError as error:
            raise DeltatuneError("; ".join(f"{source}: {_told(problem)}" for problem in error.errors())) from None
        except DeltatuneError as error:
            raise DeltatuneError(f"{source}: {error}") from None
        return recipe

    def made_method(self) -> Method | None:
        """The method, a `Union` where several are listed; None for `full`."""
        if self.method == FULL:
            return None
        several = self.method if isinstance(self.method, list) else [self.method]
        if FULL in several:
            raise DeltatuneError("method: full trains every weight, so it takes no other method beside it")
        made = tuple(_made(Method, spec, "method") for spec in several)
        if not made:
            raise DeltatuneError("method: the list is empty; name a method, such as lora")
        return made[0] if len(made) == 1 else Union(methods=made)

    def made_callbacks(self) -> list[Callback]:
        return [_made(Callback, spec, "callbacks") for spec in self.callbacks]

    def write(self, path: Path) -> None:
        """All keys, with every default filled in, so that a later version with other defaults repeats the run."""
        told = self.model_dump(mode="json", exclude={"train": {"seed"}})
        if (method := self.made_method()) is not None:
            told["method"] = [_written(part) for part in (method.methods if isinstance(method, Union) else (method,))]
        told["callbacks"] = [_written(callback) for callback in self.made_callbacks()]
        text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
        write_atomically(path, text.encode())


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2 (`1e-4` is one), without duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _override(given: dict[str, Any], override: str) -> None:
    """Sets `train.lr=1e-4`, or `lr=1e-4` where one place has such a key, in a recipe as read."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DeltatuneError(f"{override!r} is no override; write key=value, such as train.lr=1e-4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise DeltatuneError(f"{override!r}: not a YAML value: {' '.join(str(error).split())}") from None
    *path, last = (key if "." in key else _place(given, key)).split(".")
    inner: Any = given
    for name in path:
        key_of: Any = int(name) if isinstance(inner, list) and name.isdigit() and int(name) < len(inner) else name
        if isinstance(inner, list) and key_of is name:
            raise DeltatuneError(f"{override!r}: there are several; name one by its number, as {path[0]}.0.{last}")
        had = inner[key_of] if isinstance(inner, list) else inner.get(name)
        if not isinstance(had, (dict, list)):  # a short form
            usual = {"method": {"name": "lora"}}.get(name, {})
            had = inner[key_of] = usual if had is None else {"train" if name == "data" else "name": had}
        inner = had
    if isinstance(inner, list):
        raise DeltatuneError(f"{override!r}: there are several; name one by its number, as {path[0]}.0.{last}")
    inner[last] = value


def _place(given: Mapping[str, Any], key: str) -> str:
    """The one dotted key that `key` is short for. Raises, with the nearest, when there is none or several."""
    if key in Recipe.model_fields:
        return key
    places = {f"data.{n}" for n in Data.model_fields} | {f"train.{n}" for n in TrainOptions.model_fields if n != "seed"}
    spec = given.get("method", "lora")
    for prefix, one in (
        [(f"method.{i}", s) for i, s in enumerate(spec)] if isinstance(spec, list) else [("method", spec)]
    ):
        name = one.get("name", "") if isinstance(one, Mapping) else one
        if name != FULL:
            places |= {f"{prefix}.{f.name}" for f in dataclasses.fields(named(Method, str(name)))}
    found = sorted(place for place in places if place.rpartition(".")[2] == key)
    if len(found) > 1:
        raise DeltatuneError(f"{key!r} could be {' or '.join(found)}; write one of these")
    if not found:
        known = [*Recipe.model_fields, *(place.rpartition(".")[2] for place in places)]
        raise DeltatuneError(f"a recipe has no key {key!r}{nearest(key, known)}")
    return found[0]


def _made(kind: Any, spec: Spec, key: str) -> Any:
    try:
        return make(kind, _values(spec))
    except (DeltatuneError, TypeError) as error:
        raise DeltatuneError(f"{key}: {error}") from None


def _values(spec: Any) -> Any:
    """`spec` with each `{type: Part, …}` in it made: selections, which the registry does not name."""
    if isinstance(spec, Mapping):
        inner = {key: _values(value) for key, value in spec.items()}
        return Config.from_dict(inner) if "type" in inner else inner
    return tuple(map(_values, spec)) if isinstance(spec, (list, tuple)) else spec


def _written(value: Any) -> Any:
    """What `_values` and the registry make `value` of."""
    if isinstance(value, Config):
        kind = "name" if isinstance(value, (Method, Callback)) or "inits" in type(value).__module__ else "type"
        return {kind: type(value).__name__} | {
            f.name: _written(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _written(inner) for key, inner in value.items()}
    return [_written(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _told(problem: Any) -> str:
    """One of pydantic's errors, by key, with the nearest name or the value."""
    place, what = ".".join(map(str, problem["loc"])), str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        *path, key = map(str, problem["loc"])
        known = Data.model_fields if path == ["data"] else Recipe.model_fields
        hint = nearest(key, known) or f"; it has {', '.join(known)}"
        return f"{path[0] if path else 'a recipe'} has no key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {what[0].lower() + what[1:]}, got {problem['input']!r}" if place else what
