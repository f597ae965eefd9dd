"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): what blocks keep of the forward pass, or do again.

A block that keeps its products runs again without them, so that norms, activations and the like are all it repeats
(the selective recomputation of Korthikanti et al. 2022, arXiv:2205.05198, with the choice turned around: products are
what costs time). Random numbers are drawn again as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from deltatune.core.errors import DeltatuneError

Recompute = Literal["none", "blocks", "products"]
"""Nothing; blocks, from their inputs; or what lies between the matrix products in them, whose results are kept."""

_ATEN = torch.ops.aten
# not bmm, which makes the matrices of attention that is not fused
_PRODUCTS = {
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default, _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default, _ATEN._scaled_dot_product_cudnn_attention.default,
}  # fmt: skip


@contextmanager
def recomputing(model: Any, what: Recompute) -> Iterator[None]:
    """Inside, the blocks of `model` run again in the backward pass, in training mode; not if they do so already."""
    if what == "none" or getattr(model, "is_activation_checkpointing", False):
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        name = type(model).__name__
        raise DeltatuneError(f"train.activation_checkpointing: {what} is not possible in {name}; set it to none")
    selective = {"context_fn": _contexts} if what == "products" else {}
    model.activation_checkpointing_enable({"use_reentrant": False, **selective})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _contexts() -> Any:
    """What one block's first pass, and then its second, runs in. `_Products` is what allows mutation."""
    return create_selective_checkpoint_contexts(_Products(), allow_cache_entry_mutation=True)


class _Products:
    """Keeps the results of products, and of what is done to them in place before anything reads them.

    The second pass is given them as they were at last, and leaves out what was done in place. An operation that read
    one before would then read another value: that raises."""

    def __init__(self) -> None:
        self.kept: set[int] = set()
        self.read: set[int] = set()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS and not _drops(op, args, kwargs):
            made = context.op_output if isinstance(context.op_output, tuple) else (context.op_output,)
            self.kept.update(_storage(t) for t in made if isinstance(t, Tensor))
            return CheckpointPolicy.MUST_SAVE
        if op._schema.is_mutable and isinstance(args[0], Tensor) and (key := _storage(args[0])) in self.kept:
            if key in self.read:
                raise DeltatuneError(
                    f"train.activation_checkpointing: products is not possible here: {op} changes the result of a "
                    "matrix product after it was used; set it to blocks"
                )
            return CheckpointPolicy.MUST_SAVE
        if not op.is_view:
            self.read |= {_storage(t) for t in args if isinstance(t, Tensor)} & self.kept
        return CheckpointPolicy.PREFER_RECOMPUTE


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _drops(op: Any, args: Any, kwargs: Any) -> bool:
    """Whether it drops out: left out of the second pass, it would leave the later random numbers others."""
    given = {a.name: v for a, v in zip(op._schema.arguments, args, strict=False)} | kwargs
    return bool(given.get("dropout_p"))
