"""Structured pruning of a transformer's blocks: the rows and columns of their matrices that a narrower copy keeps.

What is multiplied or added must be kept alike: a unit of a feed-forward layer, of a head's values, or of its queries
and keys is a row of one matrix and a row or a column of another, and a unit of the residual stream is one of every
matrix. Its score is the product of what these rows and columns matter. Units of rotary queries and keys are kept evenly
spaced, so that they keep their frequencies. Query heads that share keys keep the same units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.select import Fused, Part, resolve, walk
from deltatune.models import anatomy
from deltatune.storage import layers

Scores = Callable[[nn.Module], tuple[Tensor, Tensor]]  # of a layer: how much its rows (out,), its columns (in,) matter
_ROLES = ("q", "k", "v", "qkv", "o", "up", "gate", "gate_up", "down")
_Group = dict[str, tuple[str, nn.Module]]  # role -> path in the block, layer


def blocks(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """(path, block) of the backbone at `path`, in order."""
    inside = f"{path}." if path else ""
    return [(m.path, m.module) for m in resolve(model, Part("block")) if m.path.startswith(inside)]


def magnitude(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Scores by the weights alone."""
    w = layers.read(module, "weight").detach().abs()
    return w.sum(1), w.sum(0)


def matrices(model: nn.Module) -> list[nn.Module]:
    """The linear layers of the blocks, whose scores decide."""
    return [m for path, block in blocks(model, "") for group in _groups(model, path, block)
            for _, m in group.values()]  # fmt: skip


def stream(model: nn.Module, n: int, scores: Scores) -> Tensor:
    """The n units of the residual stream that are kept, the same in all blocks of the model."""
    total: Any = 0
    for path, block in blocks(model, ""):
        for group in _groups(model, path, block):
            for role, (_, module) in group.items():
                total = total + _log(scores(module)[0 if role in ("o", "down") else 1])
    return _best(total, n)


@torch.no_grad()
def fill(model: Any, at: tuple[str, nn.Module], first: nn.Module, narrow: nn.Module, kept: Tensor, rotary: bool,
         scores: Scores) -> None:  # fmt: skip
    """Give `narrow` what is kept of the block at (path, block). `first`: the stack's first block, which alone may own
    what all of it use; `kept`: the units of the residual stream."""
    path, block = at
    index: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for group in _groups(model, path, block):
        if "down" in group:
            index |= _feed_forward(group, narrow, scores)
        if "o" in group:
            index |= _attention(model, path, group, narrow, rotary, scores)
    for sub, module in narrow.named_modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            own, goal = _owner(block, first, sub, name), layers.read(module, name)
            w = layers.read(own, name)
            for axis, at_axis in enumerate(index.get(sub, (None, None))[: w.ndim]):
                taken = _usual(w.shape[axis], goal.shape[axis], kept) if at_axis is None else at_axis
                w = w.index_select(axis, taken.to(w.device))
            layers.write(module, name, w)


def _owner(block: nn.Module, first: nn.Module, sub: str, name: str) -> nn.Module:
    """The module called `sub` that has the parameter, in the block or else in the first one."""
    paths = dict(walk(block))
    return paths[sub] if getattr(paths.get(sub), name, None) is not None else first.get_submodule(sub)


def _usual(wide: int, narrow: int, kept: Tensor) -> Tensor:
    """What is kept of an axis that no matrix but this one has, or that is the residual stream."""
    if wide != narrow and narrow == len(kept):
        return kept
    return torch.arange(narrow) * (wide // narrow)


def _groups(model: Any, path: str, block: nn.Module) -> Iterator[_Group]:
    """The layers of the block by role: feed-forward and self-attention, then the attention to an encoder."""
    known = anatomy.anatomy(model)
    found: tuple[_Group, _Group] = ({}, {})
    for sub, module in walk(block):
        full = f"{path}.{sub}"
        role = next((r for r in _ROLES if (p := getattr(known, r)) and re.fullmatch(p, full)), None)
        if role is not None and layers.is_linear(module):
            cross = known.cross_attention and re.fullmatch(rf"{known.cross_attention}\..+", full)
            found[bool(cross)][role] = (sub, module)
    yield from (group for group in found if group)


def _feed_forward(group: _Group, narrow: nn.Module, scores: Scores) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    sub, module = group["down"]
    total, n = _log(scores(module)[1]), layers.shape(narrow.get_submodule(sub), "weight")[1]
    if "gate_up" in group:
        total = total + _log(scores(group["gate_up"][1])[0]).view(2, -1).sum(0)
    for role in ("up", "gate"):
        if role in group:
            total = total + _log(scores(group[role][1])[0])
    units = _best(total, n)
    index: dict[str, tuple[Tensor | None, Tensor | None]] = {sub: (None, units)}
    index |= {group[role][0]: (units, None) for role in ("up", "gate") if role in group}
    if "gate_up" in group:
        index[group["gate_up"][0]] = torch.cat([units, units + len(total)]), None
    return index


def _attention(model: Any, path: str, group: _Group, narrow: nn.Module, rotary: bool, scores: Scores
               ) -> dict[str, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
    config = model.config
    both = getattr(config, "is_encoder_decoder", False)
    heads = anatomy.heads(config, "decoder" if both and re.search(r"(^|\.)decoder\.", path) else "encoder")
    rows: dict[str, tuple[str, nn.Module, Tensor, Tensor]] = {}  # role -> path, layer, its rows, the copy's rows
    for i, role in enumerate("qkv"):
        if role not in group and "qkv" not in group:
            return {}
        sub, module = group.get(role) or group["qkv"]
        sizes = [layers.shape(m, "weight")[0] for m in (module, narrow.get_submodule(sub))]
        if role in group:
            both_rows = [torch.arange(n) for n in sizes]
        else:
            layout, groups = anatomy.anatomy(model).layout(config)  # type: ignore[misc]
            fused = Fused(targets=None, sizes=layout, take=(i,), groups=groups)
            both_rows = [fused.rows(n, i) for n in sizes]
        rows[role] = sub, module, both_rows[0], both_rows[1]
    d, n = len(rows["q"][2]) // heads, len(rows["q"][3]) // heads
    kv = len(rows["k"][2]) // d
    out, o = group["o"]

    def of(role: str) -> Tensor:
        """(kv heads, d): what the rows matter, those of query heads multiplied."""
        _, module, mine, _ = rows[role]
        score = _log(scores(module)[0])
        return score[mine.to(score.device)].view(kv, -1, d).sum(1)

    values = _best(of("v") + _log(scores(o)[1]).view(kv, -1, d).sum(1), n)
    spaced = torch.arange(n) * (d // n)
    keys = spaced.expand(kv, n) if rotary else _best(of("q") + of("k"), n)

    def flat(units: Tensor, count: int) -> Tensor:
        """(kv heads, n) -> the rows of `count` heads."""
        return (units.cpu().repeat_interleave(count // kv, 0) + torch.arange(count)[:, None] * d).flatten()

    index: dict[str, tuple[Tensor | None, Tensor | None]] = {out: (None, flat(values, heads))}
    taken: dict[str, Tensor] = {}
    for role, units in (("q", keys), ("k", keys), ("v", values)):
        sub, _, mine, copied = rows[role]
        whole = taken.setdefault(sub, torch.zeros(0, dtype=torch.long))
        size = int(copied.max()) + 1
        if len(whole) < size:
            whole = taken[sub] = torch.cat([whole, whole.new_zeros(size - len(whole))])
        whole[copied] = mine[flat(units, heads if role == "q" else kv)]
    return index | {sub: (whole, None) for sub, whole in taken.items()}


def _best(scores: Tensor, n: int) -> Tensor:
    """Of the last axis, the n largest, in ascending order."""
    return scores.topk(n, -1).indices.sort(-1).values


def _log(t: Tensor) -> Tensor:
    t = t.float()
    return t.clamp(min=torch.finfo(t.dtype).tiny).log()
