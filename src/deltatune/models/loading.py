"""Load a base model and its tokenizer, from a folder or a hub name, with errors that say which file is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.plugins import load_plugins
from deltatune.models import quantise

TASKS = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRESH = "_deltatune_fresh"  # of a model: the modules that the base had no weights for, drawn anew
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def to_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """The precision called `name`; None for "auto": the one that the weights are stored in."""
    if isinstance(name, torch.dtype) or name == "auto":
        return name if isinstance(name, torch.dtype) else None
    if name not in DTYPES:
        raise DeltatuneError(f"dtype: {name!r} is not auto, {', '.join(DTYPES)}{nearest(name, DTYPES, 1)}")
    return DTYPES[name]


def locate(base: str | Path) -> str:
    """The folder or hub name that `base` means; `default` is the small instruct model of `models.default`."""
    if str(base) == "default":
        from deltatune.models.default import default_base

        return str(default_base())
    text, path = str(base), Path(base).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise DeltatuneError(f"base: {text} is a file; name the folder that holds config.json and {WEIGHTS}")
    if isinstance(base, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        near = nearest(path.name, [p.name for p in path.parent.glob("*")])
        raise DeltatuneError(f"base: there is no folder {text}{near}")
    return text


def load_base(base: str | Path, task: str | None = None, *, dtype: str | torch.dtype = "auto",
              labels: Sequence[str] | int | None = None, quantize: str | None = None) -> PreTrainedModel:  # fmt: skip
    """The model of `base` with the head for `task` (a key of `TASKS`; by default its language model's), in `eval` mode.

    `labels`, their names or number, size the head of a classifier, which starts untrained where the base has none.
    `quantize`: a key of `quantise.KINDS`, for the linear layers but the head; all else is in `dtype`.
    Raises DeltatuneError when the folder is incomplete (naming the file), the architecture is unknown or has no such
    head, or a language model lacks weights.
    """
    if task is not None and task not in TASKS:
        raise DeltatuneError(f"task: {task!r} is not one of {', '.join(TASKS)}{nearest(task, TASKS, 1)}")
    where, wanted = locate(base), to_dtype(dtype)
    config = read_config(where, weights=True)
    task = task or ("seq2seq" if config.is_encoder_decoder else "causal")
    head = getattr(transformers, TASKS[task])
    if type(config) not in head._model_mapping:
        raise DeltatuneError(f"base: {base}: {config.model_type!r} has no head for task {task!r}; choose another")
    if labels is not None:
        names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    how: dict[str, Any] = {}
    if quantize is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise DeltatuneError(f"quantize: {base} is quantised already; leave it out")
        with torch.device("meta"):
            blank = head.from_config(config)
        how["quantization_config"] = quantise.configuration(quantize, wanted or blank.dtype, blank)
        if torch.cuda.is_available():
            how["device_map"] = {"": torch.cuda.current_device()}
    try:
        model, info = head.from_pretrained(
            where, config=config, dtype=wanted or "auto", use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=labels is not None, **how,
        )  # fmt: skip
    except SafetensorError as error:
        raise DeltatuneError(f"base: {base}: its weights are damaged ({error}); copy them again") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DeltatuneError(f"base: {base} cannot be loaded: {_why(error, where)}") from error
    if (missing := sorted(info["missing_keys"])) and task in ("causal", "seq2seq"):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DeltatuneError(f"base: {base}: its weights lack {', '.join(missing[:3])}{more}; copy them again")
    model.__dict__[FRESH] = tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))
    if quantize is not None:
        load_plugins()  # now that the library is imported
    return cast(PreTrainedModel, model.eval())


def load_tokenizer(base: str | Path, adapters: Sequence[str | Path] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer beside the first of `adapters` that has one, else the base's, with a chat template saved there."""
    own = next((Path(a) for a in adapters if any((Path(a) / name).is_file() for name in TOKENIZERS)), None)
    where = str(own) if own is not None else locate(base)
    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in TOKENIZERS):
        raise DeltatuneError(f"base: {base}: no tokenizer there ({TOKENIZERS[0]} is missing)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DeltatuneError(f"{where}: its tokenizer cannot be read: {_why(error, where)}") from error
    if own is None and (saved := next((f for a in adapters if (f := Path(a) / "chat_template.jinja").is_file()), None)):
        tokenizer.chat_template = saved.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(base: str | Path, *, weights: bool = False) -> PreTrainedConfig:
    """The configuration of `base`; `weights` asks that the folder hold those as well."""
    where = locate(base)
    if Path(where).is_dir():
        _complete(Path(where), weights)
    try:
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(where))
    except (OSError, ValueError, KeyError) as error:
        raise DeltatuneError(f"base: {base} cannot be loaded: {_why(error, where)}") from error


def _complete(folder: Path, weights: bool) -> None:
    """Raises when the folder lacks a file, or names an architecture that transformers does not have."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DeltatuneError(f"base: {folder} is an adapter, not a base model; name its base, this is --adapter")
        raise DeltatuneError(f"base: {folder}: config.json is missing, so this is no Hugging Face model folder")
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        own = "; it needs code of its own, which is not run" if "auto_map" in config else ""
        near = nearest(str(kind), CONFIG_MAPPING.keys())
        raise DeltatuneError(f"{folder / 'config.json'}: transformers knows no model_type {kind!r}{near}{own}")
    if not weights:
        return
    if (folder / INDEX).is_file():
        shards = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
        if gone := [name for name in shards if not (folder / name).is_file()]:
            some = f"{len(gone)} of {len(shards)} weight files are missing"
            raise DeltatuneError(f"base: {folder}: {some}: {', '.join(gone[:3])}")
    elif not (folder / WEIGHTS).is_file():
        pickled = next((p.name for p in sorted(folder.glob("pytorch_model*.bin"))), None)
        why = f"; {pickled} would need unpickling, which can run code: save it as safetensors" if pickled else ""
        raise DeltatuneError(f"base: {folder}: {WEIGHTS} is missing{why}")


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DeltatuneError(f"{path}: not valid JSON ({error})") from error


def _why(error: Exception, where: str) -> str:
    remedy = "" if Path(where).is_dir() else "; give a folder, a name on huggingface.co (if connected), or 'default'"
    return (str(error).strip() or type(error).__name__).splitlines()[0] + remedy
