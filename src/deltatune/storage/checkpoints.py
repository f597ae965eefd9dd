"""Single weights out of a saved model, read from its safetensors files without loading the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def folder_of(source: str | Path) -> Path | None:
    """The folder that `source`, a folder or the name of a model in the hub's cache, means; None if there is none."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", INDEX], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        return None


def tensor(folder: Path, names: Iterable[str]) -> Tensor | None:
    """The first of `names` that the files hold."""
    index = folder / INDEX
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
    for name in names:
        file = folder / (WEIGHTS if where is None else where.get(name, ""))
        if file.is_file():
            with safe_open(file, framework="pt") as held:
                if name in held.keys():  # noqa: SIM118  no mapping
                    return held.get_tensor(name)
    return None
