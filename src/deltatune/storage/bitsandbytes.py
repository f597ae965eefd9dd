"""Weights quantised by bitsandbytes: 4 bits (Dettmers et al. 2023, arXiv:2305.14314), LLM.int8() (arXiv:2208.07339).

    NF4       W ~ code[i] c            blocks of 64 values; c, their absmax, quantised again where it is nested
    int8      W ~ i c / 127            c the absmax of each output row

`read` gives these values, `write` makes the codes that the library makes when it loads a model.
"""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes.nn as bnb
from bitsandbytes import functional as F
from torch import Tensor

from deltatune.storage import layers

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each call with fp32


def _read_4bit(module: Any, param: str) -> Tensor:
    _settle(module)
    return F.dequantize_4bit(module.weight.data, module.weight.quant_state)


def _write_4bit(module: Any, param: str, w: Tensor) -> None:
    old = module.weight
    new: Any = bnb.Params4bit(w.to(old.quant_state.dtype), False, blocksize=old.blocksize, quant_type=old.quant_type,
                              compress_statistics=old.compress_statistics, quant_storage=old.quant_storage,
                              module=module)  # fmt: skip
    module._parameters["weight"] = new.to(old.device)


def _settle(module: Any) -> None:
    """On some CPUs the first call without gradients packs the weight anew, into a form that has no backward pass."""
    module.support_avx512bf16_for_cpu = False
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        module.weight.data, _ = F._convert_weight_packed_for_cpu_inverse(module.weight.data, state)


def _scales(module: Any) -> Tensor:
    """(out,): with the weight, until the first call moves them into the module's state."""
    return module.state.SCB if getattr(module.weight, "SCB", None) is None else module.weight.SCB


def _read_8bit(module: Any, param: str) -> Tensor:
    return module.weight.data.float() * (_scales(module)[:, None] / 127)


def _write_8bit(module: Any, param: str, w: Tensor) -> None:
    old = module.weight
    old.CB, old.SCB = old.data, _scales(module)  # whole again, for when it is put back
    new: Any = bnb.Int8Params(w.float().cpu(), requires_grad=False, has_fp16_weights=False)
    module._parameters["weight"] = new.to(old.device)


layers.register(bnb.Linear4bit, layers.QUANTISED, read=_read_4bit, write=_write_4bit, settle=_settle)
layers.register(bnb.Linear8bitLt, layers.QUANTISED, read=_read_8bit, write=_write_8bit)
