"""Checkpoints of a run, from which it goes on bit for bit: safetensors and JSON, nothing pickled.

checkpoints/step-120/   weights, optimizer, callbacks .safetensors and state.json
checkpoints/last        the name of the folder to resume from
checkpoints/best        the name of the folder with the least evaluation loss
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltatune.core.adapter import write_atomically
from deltatune.core.errors import DeltatuneError

FORMAT, STATE, KEPT = 1, "state.json", 2
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's `state`, as JSON, and its tensors by file: weights, optimizer, callbacks."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class Checkpoints:
    """The folder `checkpoints` of a run."""

    def __init__(self, output: Path) -> None:
        self.folder = output / "checkpoints"

    def __getitem__(self, pointer: str) -> Path | None:
        """The folder that "last" or "best" names; None when there is none yet."""
        link = self.folder / pointer
        return self.folder / link.read_text(encoding="utf-8").strip() if link.is_file() else None

    def save(self, snapshot: Snapshot) -> Path:
        """Writes, syncs, renames, points `last` and `best` there, and removes all but the last two and the best.

        Raises DeltatuneError when that fails, as on a full disk; earlier checkpoints are then as they were."""
        step, best = snapshot.state["step"], snapshot.state["best"]
        path = self.folder / f"step-{step}"
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".step-*"):
                shutil.rmtree(stale)
            temporary = Path(tempfile.mkdtemp(prefix=f".step-{step}.", dir=self.folder))
            _write(temporary, snapshot)
            if path.exists():  # a run killed before it pointed here
                shutil.rmtree(path)
            temporary.chmod(0o755)
            temporary.rename(path)
            _sync(self.folder)
            write_atomically(self.folder / "last", path.name.encode())
            if best is not None:
                write_atomically(self.folder / "best", f"step-{best['step']}".encode())
            _sync(self.folder)
        except (OSError, SafetensorError) as e:
            why = (e.strerror if isinstance(e, OSError) else None) or str(e)
            before = self["last"]
            kept = f"{before} is unchanged; make room and resume from it" if before else "there is no earlier one"
            raise DeltatuneError(f"{path}: the checkpoint could not be written ({why}); {kept}") from e
        finally:
            if temporary is not None and temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        self._prune(None if best is None else best["step"])
        return path

    def _prune(self, best: int | None) -> None:
        steps = sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))
        for step in steps[:-KEPT]:
            if step != best:
                shutil.rmtree(self.folder / f"step-{step}")


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name, tensors in snapshot.tensors.items():
        flat = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        save_file(flat, folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps({"format": FORMAT, **snapshot.state}), encoding="utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> Snapshot:
    """Raises DeltatuneError when the checkpoint is not whole, or of a newer format."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    except (OSError, ValueError, SafetensorError) as e:
        raise DeltatuneError(f"{path}: not a whole checkpoint ({e}); resume from another by naming it in `last`") from e
    if state["format"] > FORMAT:
        raise DeltatuneError(f"{path}: format {state['format']} is newer than {FORMAT}, read here; upgrade deltatune")
    return Snapshot(state, tensors)


def weights(model: nn.Module, adapter: Any) -> dict[str, Tensor]:
    """What a run trains: the adapter's tensors, or the model's parameters when there is no adapter."""
    return dict(model.named_parameters()) if adapter is None else adapter.state_dict()


@torch.no_grad()
def restore_weights(model: nn.Module, adapter: Any, saved: Tensors) -> None:
    """Fills what `weights` gives; raises DeltatuneError before touching it when a name or a shape does not fit."""
    if adapter is not None:
        adapter.load_state_dict(saved)
        return
    own = weights(model, None)
    shapes, saved_shapes = ({k: t.shape for k, t in some.items()} for some in (own, saved))
    if wrong := [k for k in shapes.keys() | saved_shapes.keys() if shapes.get(k) != saved_shapes.get(k)]:
        raise DeltatuneError(f"resume: {wrong[0]!r} is not the saved run's; load the model that it trained")
    for name, p in own.items():
        p.copy_(saved[name])


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors named `parameter.value`, what JSON holds): together all of `optimizer.state_dict()`.

    A value may be a mapping of further ones, as the 8-bit moments of bitsandbytes are: `parameter.value.part`."""
    whole = optimizer.state_dict()
    flat: dict[str, Any] = {}
    for i, values in whole["state"].items():
        for k, v in values.items():
            flat |= {f"{i}.{k}.{n}": t for n, t in v.items()} if isinstance(v, Mapping) else {f"{i}.{k}": v}
    rest = {k: v for k, v in flat.items() if not isinstance(v, Tensor)}
    return {k: v for k, v in flat.items() if isinstance(v, Tensor)}, {"groups": whole["param_groups"], "values": rest}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, rest: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["values"]}.items():
        i, name, *part = key.split(".", 2)
        own = state.setdefault(int(i), {})
        (own.setdefault(name, {}) if part else own)[part[0] if part else name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in rest["groups"]]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as e:
        raise DeltatuneError(f"resume: the saved optimizer trains other parameters ({e}); restore the callbacks") from e


def random_state() -> dict[str, Any]:
    """The states of every generator that a step may draw from, as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_bytes(s) for s in state["cuda"]])


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
