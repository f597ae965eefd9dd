"""Quantised bases: which kinds there are, what each needs, how much it holds, and the way back."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.plugins import load_plugins
from deltatune.core.select import walk
from deltatune.core.surgery import adapters
from deltatune.storage import layers

Quantise = Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
GROUP = 32  # columns of a weight that share a scale in torchao-int4


@dataclass(frozen=True)
class Kind:
    """`library` is its distribution; `bits` are those of a weight, scales included, but for `per_row` more a row."""

    library: str
    bits: float
    per_row: int
    what: str


KINDS: dict[str, Kind] = {
    # absmax of 64 weights in 8 bits, an fp32 scale for 256 of those (Dettmers et al. 2023, sec. 3)
    "nf4": Kind("bitsandbytes", 4 + 8 / 64 + 32 / (64 * 256), 0, "4-bit NormalFloat, scales quantised again"),
    "int8": Kind("bitsandbytes", 8, 32, "LLM.int8(): 8 bits, outlying columns of the input apart"),
    "torchao-int8": Kind("torchao", 8, 40, "8 bits, weights only"),
    # its packed layouts have no backward pass, so a byte for each value, and a scale and a zero point for a group
    "torchao-int4": Kind("torchao", 8 + 40 / GROUP, 0, "16 values, in a byte each, weights only"),
}
assert set(KINDS) == set(get_args(Quantise))


def require(kind: str) -> None:
    """Raises DeltatuneError for an unknown kind, or when its library is missing."""
    if kind not in KINDS:
        raise DeltatuneError(f"quantize: {kind!r} is not one of {', '.join(KINDS)}{nearest(kind, KINDS, 1)}")
    library = KINDS[kind].library
    if importlib.util.find_spec(library) is None:
        raise DeltatuneError(
            f"quantize: {kind} needs {library}, which is not installed: pip install 'deltatune[quant]', or leave it out"
        )


def configuration(kind: str, dtype: torch.dtype, blank: Any) -> Any:
    """What transformers is to be told to load `blank`, which has no weights yet, as `kind`; products run in `dtype`.

    Raises DeltatuneError where `require` does, or when it has no layer for `kind`."""
    require(kind)
    if not any(quantisable(blank, kind)):
        raise DeltatuneError(
            f"quantize: {kind} finds no layer in {type(blank).__name__} to quantise; use nf4 or int8, or leave it out"
        )
    spared = kept(blank)
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=spared)  # fmt: skip
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if kind == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=spared)
    four: Any = torch.int4  # type: ignore[attr-defined]
    return TorchAoConfig(IntxWeightOnlyConfig(four, PerGroup(GROUP)), modules_to_not_convert=spared)


def kept(model: Any) -> list[str]:
    """Paths of what is not quantised: output embeddings, what is tied to them, and the head of a classifier."""
    *_, last = (path for path, module in walk(model) if not list(module.children()))
    head = last.partition(".")[0]
    return [*get_keys_to_not_convert(model), *([] if head == model.base_model_prefix else [head])]


def quantisable(model: Any, kind: str) -> Iterator[nn.Module]:
    """The layers of an ordinary model that loading would quantise."""
    plain = KINDS[kind].library == "torchao"
    types, wide = ((nn.Linear,), ()) if plain else ((nn.Linear, Conv1D), model._keep_in_fp32_modules or ())
    spared = [*kept(model), *wide]
    return (m for path, m in walk(model) if type(m) in types and should_convert_module(path, spared))


def saved_bytes(model: Any, kind: str) -> int:
    """How much less its weights hold as `kind` than as they are; computed, also where they lie on "meta"."""
    found = KINDS[kind]
    total = 0
    for module in quantisable(model, kind):
        w = module.weight
        rows = layers.shape(module, "weight")[0]
        total += w.numel() * w.element_size() - int(w.numel() * found.bits + rows * found.per_row) // 8  # type: ignore[operator, union-attr]
    return total


@torch.no_grad()
def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Ordinary layers in place of quantised ones, holding the values that those stand for."""
    load_plugins()
    if adapters(model):
        raise DeltatuneError("dequantise the model before adapters are attached, or detach them first")
    for path, module in list(walk(model)):
        if not layers.is_quantised(module):
            continue
        w, bias = layers.read(module, "weight").to(dtype), module._parameters.get("bias")
        with torch.device("meta"):
            plain: Any = Conv1D(*w.shape) if layers.was_transposed(module) else nn.Linear(w.shape[1], w.shape[0])
        plain.weight = nn.Parameter(w.T.contiguous() if isinstance(plain, Conv1D) else w, requires_grad=False)
        plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, plain.train(module.training))
    for owner, names in ((model.config, ("quantization_config", "_pre_quantization_dtype")), (model, _MARKS)):
        for name in names:
            vars(owner).pop(name, None)
    return model
