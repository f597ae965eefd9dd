"""An adapter's tensors under PEFT's names, out of a live adapter and into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deltatune.core import Adapter, DeltatuneError
from deltatune.core import adapter as written_by
from deltatune.core import checkpoint as read_by
from deltatune.methods.tune import Copy
from deltatune.storage import layers


def encoded(adapter: Adapter) -> dict[str, Tensor]:
    found = next((w for encode in written_by._ENCODERS if (w := encode(adapter)) is not None), None)
    if found is None:
        kind = type(adapter.method).__name__
        raise DeltatuneError(f"adapter {adapter.name!r} ({kind}) cannot be expressed in PEFT's format")
    return found[1]


def fill(adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Load what a folder holds into an adapter that is there; raises, with nothing changed, when it does not fit."""
    if config.get("deltatune", {}).get("tensors") != "deltatune":
        tensors = _by_unit(adapter, read_by.decoded(adapter.model, config, tensors)[1])
    adapter.load_state_dict(tensors)


def _by_unit(adapter: Adapter, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found` under the live adapter's names. A file tells a module's units apart by what they hold, not by number; it
    leaves out copies that equal the base; and PiSSA's and OLoRA's start is in it as a second half of the factors."""
    paths = {path for path, *_ in adapter.sites()}
    parts = iter(adapter.record.shared)
    part: dict[str, str] = {}  # of what all units of a part share: its number there, and here
    held: dict[tuple[str, str], list[Tensor]] = {}
    fitted: dict[str, Tensor] = {}
    for key, t in found.items():
        words = key.split(".")
        at = next((i for i, word in enumerate(words) if word.isdigit() and ".".join(words[:i]) in paths), None)
        if at is None and words[0] == "shared":
            part[words[1]] = part.get(words[1]) or next(parts, words[1])
            fitted[".".join(["shared", part[words[1]], *words[2:]])] = t
        elif at is None:
            fitted[key] = t
        else:
            held.setdefault((".".join(words[:at]), ".".join(words[at + 1 :])), []).append(t)
    for (path, module, unit, place), (name, _) in zip(adapter.sites(), adapter.units(), strict=True):
        for own in unit.state_dict():
            if queue := held.get((path, own)):
                fitted[f"{name}.{own}"] = queue.pop(0)
            elif isinstance(unit, Copy):
                fitted[f"{name}.{own}"] = layers.read(module, place).detach()
            elif own.endswith("a0") and f"{name}.{own[:-1]}" in fitted:
                a, b = f"{name}.{own[:-1]}", f"{name}.{own[:-2]}b"
                (down, less), (more, start) = fitted[a].chunk(2), fitted[b].chunk(2, 1)
                fitted[a], fitted[f"{a}0"] = down, down - less
                fitted[b], fitted[f"{b}0"] = start + more, start
    rest = {f"{path}.?.{own}": t for (path, own), queue in held.items() for t in queue}
    return fitted | rest
