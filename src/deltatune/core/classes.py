"""The classes that a model tells apart: its configuration names those of the head in effect, own or an adapter's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from deltatune.core.errors import DeltatuneError
from deltatune.core.slot import Active, Switch


def put(model: nn.Module, switch: Switch, active: Active) -> None:
    """Make `active` what is in effect, in all threads."""
    switch.current = active
    tell(model, switch)


def tell(model: Any, switch: Switch) -> None:
    """Name the classes of the outermost head in effect; of rows with heads of their own or the base's, only if all
    agree."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "id2label"):
        return
    active = switch.current
    heads = [own for n in (*switch.merged, *active.names) if (own := switch.records[n].method.classes())]
    if not heads and switch.named is None:
        return
    switch.named = switch.named or (config.id2label, config.label2id)
    config.id2label, config.label2id = switch.named
    if heads:
        rows = {switch.records[n].method.classes() if n is not None else () for n in _rows(active)}
        same = active.router is None or len({own or base(config, switch) for own in rows}) == 1
        _name(config, heads[-1] if same else [f"LABEL_{i}" for i in range(len(heads[-1]))])
    if hasattr(model, "num_labels"):  # by which a model with a head counts its logits
        model.num_labels = len(config.id2label)


def keep(model: Any, switch: Switch, name: str) -> None:
    """The head of `name` is the base's own from now on."""
    config: Any = getattr(model, "config", None)
    if (own := switch.records[name].method.classes()) and hasattr(config, "id2label"):
        _name(config, own)
        switch.named = config.id2label, config.label2id


def agree(model: Any, switch: Switch, active: Active) -> None:
    """Raises DeltatuneError if the rows of a batch would have heads of different sizes."""
    router = active.router
    config: Any = getattr(model, "config", None)
    heads = {n: len(switch.records[n].method.classes()) if n is not None else 0 for n in _rows(active)}
    if router is None or not any(heads.values()):
        return
    sizes = {n: size or len(base(config, switch)) for n, size in heads.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{'the base' if n is None else repr(n)} {size}" for n, size in sizes.items())
        raise DeltatuneError(
            f"the heads of one batch tell different numbers of classes apart: {told}; run these rows in other batches"
        )


def base(config: Any, switch: Switch) -> tuple[str, ...]:
    """The classes of the head that is the base's, or that was merged into it."""
    merged = [own for n in switch.merged if (own := switch.records[n].method.classes())]
    named = getattr(config, "id2label", None) if switch.named is None else switch.named[0]
    return merged[-1] if merged else tuple((named or {}).values())


def _rows(active: Active) -> tuple[str | None, ...]:
    """What rows may be under: the active adapters, and None where the router names the base."""
    return (*active.names, *(n for n in getattr(active.router, "names", ()) if n is None))


def _name(config: Any, labels: Sequence[str]) -> None:
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
