"""Weights quantised by torchao, which are tensors of their own types in ordinary layers.

    W ~ (i - z) c           c, z of each output row, or of a group of columns in it

`write` keeps a weight's type, group and range. Packed types, made for one kernel, are read through that kernel, and
cannot be written.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.granularity import PerGroup, PerRow
from torchao.utils import TorchAOBaseTensor

from deltatune.storage import layers


def _read(module: Any, param: str) -> Tensor:
    w = module.weight.detach()
    if type(w).dequantize is not Tensor.dequantize:
        return w.dequantize()
    return F.linear(torch.eye(w.shape[1], dtype=w.dtype, device=w.device), w).T.contiguous()


def _write_int8(module: Any, param: str, w: Tensor) -> None:
    old = module.weight
    group = PerRow() if old.block_size[-1] == w.shape[1] else PerGroup(old.block_size[-1])
    _replace(module, Int8Tensor.from_hp(w.to(old.dtype), group, act_quant_kwargs=old.act_quant_kwargs,
                                        reduce_range=old.reduce_range))  # fmt: skip


def _write_intx(module: Any, param: str, w: Tensor) -> None:
    old = module.weight
    _replace(module, IntxUnpackedToInt8Tensor.from_hp(w.to(old.dtype), old.block_size, old.target_dtype,
                                                      activation_quantization=old.activation_quantization))  # fmt: skip


def _replace(module: nn.Module, w: Tensor) -> None:
    module._parameters["weight"] = nn.Parameter(w, requires_grad=False)


layers.register_tensor(Int8Tensor, _read, _write_int8)
layers.register_tensor(IntxUnpackedToInt8Tensor, _read, _write_intx)
layers.register_tensor(TorchAOBaseTensor, _read)
