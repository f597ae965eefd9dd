"""`Adapter`: the handle of a named adapter on a model: what is trained, saved and served."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from deltatune.core.callback import Callback
from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.method import Method
from deltatune.core.plugins import load_plugins
from deltatune.core.slot import Record, slots, switch_of
from deltatune.core.units import Intervention

CONFIG, TENSORS, FORMAT = "adapter_config.json", "adapter_model.safetensors", 1
Written = tuple[dict[str, Any], dict[str, Tensor]]
Encoder = Callable[["Adapter"], Written | None]

_ENCODERS: list[Encoder] = []


def register_encoder(encode: Encoder) -> None:
    """Add a foreign format: (its configuration, its tensors) for the adapters that it can express, else None."""
    _ENCODERS.append(encode)


class Adapter:
    """A named adapter on a model. Made by `attach` and `load`."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.method}, {sum(p.numel() for p in self.parameters()):,} parameters)"

    @property
    def record(self) -> Record:
        switch = switch_of(self.model)
        if switch is None or self.name not in switch.records:
            raise DeltatuneError(f"adapter {self.name!r} is no longer attached")
        return switch.records[self.name]

    @property
    def method(self) -> Method:
        return self.record.method

    @property
    def dtype(self) -> torch.dtype:
        return self.record.dtype

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that its head tells apart; () if it has no head of its own."""
        return self.method.classes()

    @property
    def mergeable(self) -> bool:
        """Whether `merge` can make the base do what this does."""
        try:
            for _, module, unit, _ in self.sites():
                unit.merged(module)
        except DeltatuneError:
            return False
        return True

    def callbacks(self) -> list[Callback]:
        return list(self.method.callbacks())

    def sites(self) -> Iterator[tuple[str, nn.Module, Intervention, str]]:
        """(path, module, unit, place) of every unit."""
        for path, module, slot in slots(self.model):
            for unit, place in slot.pairs(self.name):
                yield path, module, unit, place

    def units(self) -> Iterator[tuple[str, Intervention]]:
        """(name, unit), where the name is the module's path and the unit's number there: `layers.0.q_proj.0`."""
        number: dict[str, int] = {}
        for path, _, unit, _ in self.sites():
            i = number[path] = number.get(path, -1) + 1
            yield f"{path}.{i}".lstrip("."), unit

    def _tensors(self, kind: Callable[[nn.Module], Iterator[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
        """Named tensors, shared ones first and once, under `shared.`."""
        seen: set[int] = set()
        for path, module in (("shared", self.record.shared), *self.units()):
            for name, t in kind(module):
                if id(t) not in seen:
                    seen.add(id(t))
                    yield f"{path}.{name}", t

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._tensors(nn.Module.named_parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    def roles(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(role, parameter), with roles such as "down", "up", "scale", or "other"."""
        seen: set[int] = set()
        for _, unit in self.units():
            for sub in unit.modules():
                for n, p in sub.named_parameters(recurse=False):
                    if id(p) not in seen:
                        seen.add(id(p))
                        yield getattr(sub, "roles", {}).get(n, "other"), p

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that the adapter's output depends on, by name; views of the live ones."""
        return dict(self._tensors(lambda m: iter(m.state_dict(keep_vars=True).items())))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill the adapter; raises before touching it when a name is missing, unknown, or of another shape."""
        growing = [(f"{path}.{name}".rstrip("."), module) for path, unit in self.units()
                   for name, module in unit.named_modules() if isinstance(module, Intervention) and module.grows
                   ]  # fmt: skip
        free = {f"{path}.{n}" for path, module in growing for n in module.grows}
        own = {k: t for k, t in self.state_dict().items() if k not in free}
        wrong = [f"{k!r} is missing" for k in own if k not in state]
        wrong += [f"{k!r} is unknown{nearest(k, own, 1)}" for k in state if k not in own and k not in free]
        wrong += [
            f"{k!r} has shape {tuple(state[k].shape)}, not {tuple(t.shape)}"
            for k, t in own.items()
            if k in state and state[k].shape != t.shape
        ]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise DeltatuneError(f"adapter {self.name!r} does not fit the tensors: {'; '.join(wrong[:4])}{more}")
        for path, module in growing:
            module.expect({n: state[k].shape for n in module.grows if (k := f"{path}.{n}") in state})
        own = self.state_dict()
        with torch.no_grad():
            for k, v in state.items():
                own[k].copy_(v)

    def save(self, folder: str | Path) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors`, in PEFT's layout where PEFT has the method."""
        load_plugins()
        method = self._portable_method()
        own = {"format": FORMAT, "name": self.name, "method": method.to_dict()}
        rewritten = any(self.name in slot.rewritten for *_, slot in slots(self.model))  # no other format says with what
        encoded = None if rewritten else next((w for e in _ENCODERS if (w := e(self)) is not None), None)
        config, tensors = encoded or ({}, self.state_dict())
        own["tensors"] = "peft" if encoded else "deltatune"
        if self.labels:
            own["labels"] = list(self.labels)
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        flat = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        write_atomically(out / TENSORS, serialise(flat, metadata={"format": "pt"}))
        text = json.dumps({**config, "deltatune": own}, indent=2, sort_keys=True)
        write_atomically(out / CONFIG, text.encode())
        return out

    def _portable_method(self) -> Method:
        """The method with targets that can be written down: those that are code become the paths that they found."""
        method = self.method.portable([unit for _, unit in self.units()])
        try:
            method.to_dict()
        except DeltatuneError:
            if len(method.parts()) > 1:  # whose paths are whose is not kept
                raise
            return dataclasses.replace(method, targets=tuple(dict.fromkeys(path for path, *_ in self.sites())))
        return method


def save(adapter: Adapter, folder: str | Path) -> Path:
    """Write `adapter` to `folder`: see `Adapter.save`."""
    return adapter.save(folder)


@torch.no_grad()
def flatten(adapter: Adapter) -> None:
    """Replace the networks that only training needs (of a prefix, of a prompt) by what they make, the same to the bit:
    that alone is saved then, and trained if training goes on."""
    method = adapter.method
    flat = method.flat()
    for _, unit in adapter.units():
        unit.flatten()
    for i, (part, now) in enumerate(zip(method.parts(), flat.parts(), strict=True)):
        if part != now and str(i) in adapter.record.shared:
            del adapter.record.shared[str(i)]
    adapter.record.method = flat


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, sync, rename: `path` holds all of `data`, or what it held before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as e:
        raise DeltatuneError(f"{path}: could not be written ({e.strerror}); what was there is unchanged") from e
    finally:
        if os.path.exists(name):
            os.unlink(name)
