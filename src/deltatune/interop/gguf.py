"""Write a low-rank adapter as a GGUF file for llama.cpp (`llama-cli -m base.gguf --lora adapter.gguf`).

The format, from llama.cpp's `llama-adapter.cpp`: `general.type` is "adapter", `adapter.type` "lora",
`general.architecture` the base's, and for each tensor of the base that changes

    <name>.lora_a (r, in),  <name>.lora_b (out, r):     W' = W + (adapter.lora.alpha / r) lora_b @ lora_a

A base is rearranged as it becomes GGUF, and `lora_b` with it: its rows are the base's rows.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from deltatune.core import Adapter, Delta, DeltatuneError, Fused, nearest
from deltatune.models import anatomy

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi": gguf.MODEL_ARCH.PHI2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "bloom": gguf.MODEL_ARCH.BLOOM,
    "falcon": gguf.MODEL_ARCH.FALCON,
}
EMBEDDING, HEAD = "token_embd", "output"


def write_gguf(adapter: Adapter, path: str | Path) -> Path:
    """Write `adapter` (fp32) to `path`. Raises DeltatuneError, with nothing written, when it is not made of low-rank
    changes of matrices, or llama.cpp does not have the base's architecture or tensor."""
    config: Any = adapter.model.config
    kind = config.model_type
    if kind not in ARCHITECTURES:
        near = nearest(kind, ARCHITECTURES)
        raise DeltatuneError(f"GGUF: no adapter for model type {kind!r}{near}; known: {', '.join(ARCHITECTURES)}")
    tensors = _tensors(adapter, config)
    alpha = float(next(iter(tensors.values()))[1].shape[1])
    out = Path(path)
    if not out.parent.is_dir():
        raise DeltatuneError(f"{out}: there is no folder {out.parent}")
    handle, scratch = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (a, b) in tensors.items():
            # alpha is one for the whole file, while ranks may differ: what is left of the scale goes into lora_b
            writer.add_tensor(f"{name}.lora_a", _array(a))
            writer.add_tensor(f"{name}.lora_b", _array(b * (b.shape[1] / alpha)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, out)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return out


def _tensors(adapter: Adapter, config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """GGUF name -> (lora_a, lora_b) with delta = lora_b @ lora_a; several of one matrix become one of higher rank."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], anatomy.layers(config))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, _, unit, at in adapter.sites():
        factors = unit.factors() if isinstance(unit, Delta) and at == "weight" else None
        if factors is None:
            raise DeltatuneError(
                f"GGUF: {path}.{at}: {type(unit).__name__} is no low-rank change of a matrix, all that llama.cpp's"
                " adapters can hold; export the merged model instead (--to hf), if the method can be merged"
            )
        if (name := names.get_name(path)) is None:
            raise DeltatuneError(f"GGUF: llama.cpp's {config.model_type} has no {path!r}; leave it out of the targets")
        if name in (EMBEDDING, HEAD) and config.tie_word_embeddings:
            raise DeltatuneError(
                f"GGUF: {path}: this base shares its embedding with its output head, and llama.cpp cannot change"
                " one of the two; export the merged model instead (--to hf)"
            )
        up, down = (f.detach().double().cpu() for f in factors)
        # looked up by token, llama.cpp's embedding adapter has A and B the other way round: (tokens, r) and (dim, r)
        a, b = (up, down.T) if name == EMBEDDING else (down, up[_rows(config, path, len(up))])
        key = f"{name}.weight"
        if key in found:
            a0, b0 = found[key]
            a, b = torch.cat([a0, a], 1 if name == EMBEDDING else 0), torch.cat([b0, b], 1)
        found[key] = a, b
    return found


def _rows(config: Any, path: str, out: int) -> Tensor:
    """The base's rows in the order in which its GGUF file has them."""
    parts = anatomy.ANATOMY[config.model_type]
    rows = torch.arange(out)
    if ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA:
        for pattern, heads in ((parts.q, anatomy.heads(config)), (parts.k, anatomy.kv_heads(config))):
            if _is(pattern, path):  # rotary pairs are (i, i + d/2) in Hugging Face's layout, (2i, 2i + 1) in this one
                return rows.view(heads, 2, -1).transpose(1, 2).flatten()
    if _is(parts.qkv, path) and parts.layout is not None:
        sizes, groups = parts.layout(config)
        fused = Fused(targets=None, sizes=sizes, take=(0, 1, 2), groups=groups)
        return torch.cat([fused.rows(out, piece) for piece in fused.take])
    return rows


def _is(pattern: str | None, path: str) -> bool:
    return pattern is not None and re.fullmatch(pattern, path) is not None


def _array(t: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(t.to(torch.float32).numpy())
