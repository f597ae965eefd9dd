"""What a comparison can be asked for: methods by name, recipes by file, every weight, and the base untrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.core import DeltatuneError, Method
from deltatune.registry import named, public
from deltatune.train.options import FULL_LR
from deltatune.train.recipe import FULL, Recipe

BASE = "base"  # not a method: the base as it is, for its quality
# What a recipe has of its own among the options of training; the others are what a comparison holds equal.
OWN = ("schedule", "warmup", "weight_decay", "optimizer", "betas", "eps", "clip")


@dataclass(frozen=True)
class Entrant:
    """A line to be: `spec` and `callbacks` as in a recipe; `train` are options that it has of its own."""

    name: str
    spec: Any
    lr: float
    callbacks: tuple[Any, ...] = ()
    train: tuple[tuple[str, Any], ...] = ()
    factor: float = 1.0

    @property
    def trains(self) -> bool:
        return self.spec != BASE

    @property
    def folder(self) -> str:
        return self.name if self.factor == 1 else f"{self.name}-lr{self.lr:.3g}"


def methods(asked: str) -> list[str]:
    """The names in a comma-separated list: classes of methods, `full`, `base`, files of recipes; `all` is every
    method there is, and the base."""
    wanted = [name.strip() for name in asked.split(",") if name.strip()]
    if not wanted:
        raise DeltatuneError("methods: the list is empty; write all, or names such as lora,dora")
    found: list[str] = []
    for name in wanted:
        if name == "all":
            found += [BASE, *(n for n, c in public("methods").items() if issubclass(c, Method))]
        else:
            found.append(name if name in (FULL, BASE) or _is_file(name) else named(Method, name).__name__)
    return list(dict.fromkeys(found))


def entrants(names: Sequence[str], factors: Sequence[float] = (1.0,)) -> list[Entrant]:
    """Each of `names`, as `methods` returns them, at each multiple of its own learning rate."""
    if not factors or min(factors) <= 0 or len(set(factors)) < len(factors):
        raise DeltatuneError(f"rates: {list(factors)} are no multiples of a learning rate; write 0.3,1,3")
    found = [_entrant(name, f) for name in names for f in (factors if name != BASE else (1.0,))]
    twice = {e.folder for i, e in enumerate(found) if e.folder in {other.folder for other in found[:i]}}
    if twice:
        raise DeltatuneError(f"methods: two would be called {', '.join(sorted(twice))}; rename a recipe")
    return found


def rate(name: str) -> float:
    """The learning rate that a method has by default."""
    return FULL_LR if name in (FULL, BASE) else named(Method, name).lr


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _entrant(name: str, factor: float) -> Entrant:
    if not _is_file(name):
        return Entrant(name, name, rate(name) * factor, factor=factor)
    recipe = Recipe.read(name)
    if recipe.quantize is not None:
        raise DeltatuneError(f"{name}: quantize={recipe.quantize}: set it in the recipe compared on, for all methods")
    told = recipe.model_dump(mode="json", exclude_unset=True)
    assert recipe.train.lr is not None
    own = tuple((k, v) for k, v in told.get("train", {}).items() if k in OWN)
    return Entrant(Path(name).stem, recipe.method, recipe.train.lr * factor, tuple(recipe.callbacks), own, factor)
