"""WHERE: which modules, and which rows of them, an adapter touches.

A selection is one of

    r".*\\.q_proj"            a regular expression over the whole path, or a bare name ("q_proj") as its last part
    "all-linear"             every linear layer but the output head
    "all-layers"             every layer of a known type but a task's head: linear, convolution, embedding, layer norm
    nn.Linear                a module type
    lambda path, module: …   a predicate
    Part("q", "v")           the parts an architecture calls so, fused projections included
    Layers(targets=…, …)     those of another selection that lie in a range of blocks
    Fused(targets=…, …)      some rows of a fused projection
    (…, …)                   any of several, each of which must match
    None                     the method's usual parts
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.config import Config
from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.plugins import load_plugins
from deltatune.storage import layers

SLOT = "adapters"  # the child of a grafted module that holds its adapters
Select = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Config | tuple[Any, ...] | None
Parts = Callable[[nn.Module], Mapping[str, Select]]
_ALL = {"all-linear": layers.is_linear, "all-layers": layers.is_layer}


@dataclass(frozen=True, kw_only=True)
class Fused(Config):
    """Rows of a fused projection: `groups` repetitions of pieces with relative `sizes`, of which `take` are meant.

    GPT-2's `c_attn` is `sizes=(1, 1, 1)`; Bloom's `query_key_value`, interleaved by head, the same with `groups=heads`;
    loralib's `MergedLinear(enable_lora=[True, False, True])` is `take=(0, 2)`.
    """

    targets: Select
    sizes: tuple[int, ...]
    take: tuple[int, ...]
    groups: int = 1

    def rows(self, out: int, piece: int) -> Tensor:
        """Indices, in order, of the rows of `piece` in a weight of `out` rows."""
        unit, rest = divmod(out, self.groups * sum(self.sizes))
        if rest or piece >= len(self.sizes):
            raise DeltatuneError(f"Fused: {out} rows do not hold piece {piece} of {self.groups} x {self.sizes}")
        start = unit * sum(self.sizes[:piece])
        index = torch.arange(out).view(self.groups, -1)
        return index[:, start : start + unit * self.sizes[piece]].flatten()


@dataclass(frozen=True)
class Part(Config):
    """Parts of a known architecture, by the names that `models.anatomy` gives them: `Part("q", "v", "down")`."""

    names: tuple[str, ...]

    def __init__(self, *more: str, names: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "names", (*names, *more))


@dataclass(frozen=True, kw_only=True)
class Layers(Config):
    """Modules of `targets` in blocks `start` <= i < `stop`; negative numbers count from the last block."""

    targets: Select = None
    start: int = 0
    stop: int | None = None

    def among(self, found: list[Match]) -> list[Match]:
        """Those of `found`, the matches of `targets`, that are meant. A subclass may choose otherwise, and none."""
        number = {m.path: next((int(p) for p in m.path.split(".") if p.isdigit()), None) for m in found}
        total = 1 + max((n for n in number.values() if n is not None), default=-1)
        wanted = range(total)[self.start : self.stop]
        kept = [m for m in found if number[m.path] in wanted]
        if not kept:
            raise DeltatuneError(f"Layers: none of {total} blocks lies in {self.start}:{self.stop}")
        return kept


@dataclass(frozen=True, eq=False)
class Match:
    """A module that a selection found; `rows` are the rows of its weight, None for all of them."""

    path: str
    module: nn.Module
    rows: Tensor | None = None

    @property
    def key(self) -> tuple[str, tuple[int, ...] | None]:
        return self.path, None if self.rows is None else tuple(self.rows.tolist())


_PARTS: list[Parts] = []


def register_parts(parts: Parts) -> None:
    """Name the function that tells which parts a model has: part name -> selection."""
    _PARTS[:] = [parts]


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the base model, the root first and shared modules once; adapters are not entered."""
    seen, todo = set(), [("", model)]
    while todo:
        path, module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = [(f"{path}.{n}".lstrip("."), m) for n, m in module._modules.items() if m is not None and n != SLOT]
        todo.extend(reversed(children))


def resolve(model: nn.Module, select: Select, usual: tuple[str, ...] = ()) -> list[Match]:
    """The matches of `select` in the order of the model; raises when it, or a member of a tuple, finds nothing."""
    load_plugins()
    found = {m.key: m for m in _find(model, select, usual)}
    whole = {path for path, rows in found if rows is None}
    order = {path: i for i, (path, _) in enumerate(walk(model))}
    kept = [m for m in found.values() if m.rows is None or m.path not in whole]
    return sorted(kept, key=lambda m: order[m.path])


def _find(model: nn.Module, select: Select, usual: tuple[str, ...]) -> list[Match]:
    if select is None:
        return _find_parts(model, usual, partly=True)
    if isinstance(select, tuple):
        return [m for s in select for m in _find(model, s, usual)]
    if isinstance(select, Part):
        return _find_parts(model, select.names)
    if isinstance(select, Layers):
        return select.among(_find(model, select.targets, usual))
    if isinstance(select, Fused):
        return [
            Match(m.path, m.module, select.rows(layers.read(m.module, "weight").shape[0], piece))
            for m in _find(model, select.targets, usual)
            for piece in select.take
        ]
    left = _heads(model, select)
    found = [m for m in (Match(*at) for at in walk(model)) if _matches(select, m.path, m.module) and not left(m)]
    if not found:
        raise DeltatuneError(_nothing(model, select))
    return found


def _matches(select: Select, path: str, module: nn.Module) -> bool:
    if isinstance(select, str):
        if select in _ALL:
            return _ALL[select](module)
        bare = re.fullmatch(r"[\w.]+", select) is not None
        return re.fullmatch(select, path) is not None or (bare and f".{path}".endswith(f".{select}"))
    if isinstance(select, type):
        return isinstance(module, select)
    if callable(select):
        return select(path, module)
    raise DeltatuneError(f"targets: {select!r} is no selection; give a name, a pattern, a type or a predicate")


def _heads(model: nn.Module, select: Select) -> Callable[[Match], bool]:
    """What "all" leaves out. The head of a task is trained whole, by `Tune`: a change of a part of it had no effect."""
    if not isinstance(select, str) or select not in _ALL:
        return lambda match: False
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return lambda match: select == "all-linear" and match.module is output
    try:
        head = _PARTS[0](model).get("head")
    except DeltatuneError:  # an architecture of the user's own
        head = r"score|classifier|classification_head|lm_head|qa_outputs"
    return lambda match: isinstance(head, str) and re.fullmatch(head, match.path) is not None


def _find_parts(model: nn.Module, names: tuple[str, ...], partly: bool = False) -> list[Match]:
    """`partly`: an architecture may lack some of a method's usual parts, never all of them."""
    known = {k: v for k, v in _PARTS[0](model).items() if v is not None}
    missing = [n for n in names if n not in known]
    if missing and (not partly or len(missing) == len(names)):
        near = nearest(missing[0], known)
        raise DeltatuneError(f"{type(model).__name__} has no part {missing[0]!r}{near}; it has {', '.join(known)}")
    chosen = [known[n] for n in names if n in known]
    fused: dict[tuple[Any, ...], list[int]] = {}
    for s in chosen:
        if isinstance(s, Fused):
            fused.setdefault((s.targets, s.sizes, s.groups), []).extend(s.take)
    found = [m for s in chosen if not isinstance(s, Fused) for m in _find(model, s, ())]
    for (targets, sizes, groups), take in fused.items():  # all pieces of a fused projection are the projection
        whole = set(take) == set(range(len(sizes)))
        select = targets if whole else Fused(targets=targets, sizes=sizes, take=tuple(take), groups=groups)
        found += _find(model, select, ())
    return found


def _nothing(model: nn.Module, select: Select) -> str:
    paths = [path for path, _ in walk(model) if path]
    if not isinstance(select, str):
        kinds = sorted({type(m).__name__ for _, m in walk(model)})
        return f"targets {select!r} select no module; the model has {', '.join(kinds)}"
    word = re.sub(r"[^\w.]+", "", select.replace(r"\.", ".")).strip(".").rpartition(".")[2] or select
    names = {path.rpartition(".")[2] for path in paths}
    hint = nearest(word, names) or f"; the model has {', '.join(sorted(n for n in names if not n.isdigit())[:12])}"
    return f"targets {select!r} match no module of {type(model).__name__}{hint}"
