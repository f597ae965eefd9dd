"""Load an adapter from its folder: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatune.core.adapter import CONFIG, FORMAT, TENSORS, Adapter
from deltatune.core.errors import DeltatuneError
from deltatune.core.method import Method
from deltatune.core.plugins import load_plugins
from deltatune.core.surgery import attach, detach

Decoder = Callable[[nn.Module, Mapping[str, Any], Mapping[str, Tensor]], tuple[Method, dict[str, Tensor]]]
Reads = Callable[[Mapping[str, Any]], bool]
Reader = Callable[[Path], tuple[dict[str, Any], dict[str, Tensor]] | None]

_DECODERS: list[tuple[Reads, Decoder]] = []
_READERS: list[Reader] = []


def register_decoder(decode: Decoder, reads: Reads | None = None) -> None:
    """Name the function that reads a foreign format: (model, configuration, tensors) -> (method, tensors by our names).

    Tensors come back under the names of `Adapter.state_dict`. `reads`: whether a configuration is of that format; None
    for whatever no other function reads.
    """
    if reads is None:
        _DECODERS.append((lambda config: True, decode))
    else:
        _DECODERS.insert(0, (reads, decode))


def register_reader(read: Reader) -> None:
    """Name the function that reads folders whose files a foreign format calls otherwise: (configuration, tensors), or
    None for a folder of another format. The configuration says by which decoder it is understood."""
    _READERS.append(read)


def decoded(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Method, dict[str, Tensor]]:
    """The method and the tensors, by our names, of a configuration and tensors in a registered format."""
    return next(decode for reads, decode in _DECODERS if reads(config))(model, config, tensors)


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a saved adapter; raises when either is missing or damaged."""
    path = Path(folder)
    load_plugins()
    if (foreign := next((found for read in _READERS if (found := read(path)) is not None), None)) is not None:
        return foreign
    if not (path / CONFIG).is_file():
        raise DeltatuneError(f"{path}: no {CONFIG} there, so this is not a saved adapter")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DeltatuneError(f"{path / CONFIG}: not valid JSON ({e})") from e
    if not (path / TENSORS).is_file():
        raise DeltatuneError(f"{path}: {TENSORS} is missing; files that need unpickling are not read")
    try:
        return config, load_file(path / TENSORS)
    except SafetensorError as e:
        raise DeltatuneError(f"{path / TENSORS}: damaged ({e})") from e


def load(model: nn.Module, folder: str | Path, name: str | None = None, *, dtype: torch.dtype | None = None) -> Adapter:
    """Attach the adapter saved in `folder`, by us or by PEFT, and activate it.

    Raises DeltatuneError, and leaves the model as it was, when files are missing or tensors do not fit the model.
    """
    config, tensors = read_folder(folder)
    return restore(model, config, tensors, folder, name, dtype=dtype)


def read_adapter(model: nn.Module, folder: str | Path) -> tuple[Method, Mapping[str, Tensor]]:
    """The method and the tensors, by our names, of the adapter saved in `folder`; `model` is untouched."""
    return _described(model, *read_folder(folder), folder)


def _described(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str | Path
               ) -> tuple[Method, Mapping[str, Tensor]]:  # fmt: skip
    load_plugins()
    own = config.get("deltatune", {})
    if own.get("format", FORMAT) > FORMAT:
        raise DeltatuneError(
            f"{source}: format {own['format']} is newer than this library reads ({FORMAT}); upgrade it"
        )
    if own.get("tensors") == "deltatune":
        return Method.from_dict(own["method"]), tensors
    return decoded(model, config, tensors)


def restore(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str | Path,
            name: str | None = None, *, dtype: torch.dtype | None = None) -> Adapter:  # fmt: skip
    """Attach what a configuration and tensors, read from `source`, describe: ours, or a registered format's."""
    method, tensors = _described(model, config, tensors, source)
    adapter = attach(model, method, name or config.get("deltatune", {}).get("name") or "default", dtype=dtype)
    try:
        adapter.load_state_dict(tensors)
    except DeltatuneError as e:
        detach(model, adapter.name)
        raise DeltatuneError(f"{source}: saved for another base? {e}") from e
    return adapter
