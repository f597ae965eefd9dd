"""Models whose attention function is given the layout of a packed row: see `kernels.attention`.

transformers asks one function for the mask, once a batch, and hands the answer to the attention function of each layer.
Here the answer is the layout itself, so that nothing of size T x T is made, and recomputed layers see it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.kernels.attention import Blocks, attend
from deltatune.models.attention import configs

NAME, PLAIN = "deltatune blocks", "sdpa"
# what an attention function may be told and this one does not do
OTHERWISE = ("sliding_window", "softcap", "position_bias", "s_aux", "dropout", "output_attentions", "cache")
_LAYOUT: ContextVar[Blocks | None] = ContextVar("layout", default=None)


class Unsuitable(Exception):
    """What a model asks of its attention that a layout of blocks cannot do."""


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float | None = None,
            **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    if not isinstance(mask, Blocks):
        plain = ALL_ATTENTION_FUNCTIONS.get_interface(PLAIN, _attend)
        return plain(module, query, key, value, mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return, operator]
    return _laid_out(module, query, key, value, mask, scaling, **kwargs), None


@torch.compiler.disable  # compiled, it would be so again for each batch: the lengths of a layout are Python numbers
def _laid_out(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Blocks, scaling: float | None,
              **kwargs: Any) -> Tensor:  # fmt: skip
    if (kwargs.get("sliding_window") or 0) >= mask.longest:
        kwargs["sliding_window"] = None
    if asked := [name for name in OTHERWISE if kwargs.get(name)]:
        raise Unsuitable(f"{type(module).__name__} asks for {asked[0]}={kwargs[asked[0]]}")
    if query.shape[2] != key.shape[2] or not getattr(module, "is_causal", True):
        raise Unsuitable(f"{type(module).__name__} does not attend to its own past alone")
    return attend(query, key, value, mask, scaling)


def _mask(*args: Any, **kwargs: Any) -> Any:
    layout = _LAYOUT.get()
    return ALL_MASK_ATTENTION_FUNCTIONS[PLAIN](*args, **kwargs) if layout is None else layout


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def layout(blocks: Blocks | None) -> Iterator[None]:
    """Inside, a model of `blocked` takes its one row for these documents; None: for what its inputs say."""
    token = _LAYOUT.set(blocks)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def told() -> Blocks | None:
    """The layout of the row that is running; None where inputs say it."""
    return _LAYOUT.get()


@contextmanager
def blocked(model: nn.Module) -> Iterator[None]:
    """Inside, the attention function of `model` understands a `layout`."""
    changed = [config for config in configs(model) if config._attn_implementation == PLAIN]
    for config in changed:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = PLAIN


def may_block(model: Any, longest: int) -> bool:
    """What of `blockable` the configuration can say."""
    of = configs(model)
    return all(c._attn_implementation in (PLAIN, NAME) and _window(c, longest) >= longest for c in of)


@torch.no_grad()
def blockable(model: Any, longest: int) -> bool:
    """Whether documents in blocks, what they share computed once, give the logits that each gives alone: tried on a few
    tokens. `longest`: tokens of the longest document, which must fit into a sliding window."""
    if not may_block(model, longest):
        return False
    shared, ends = [3, 4, 5], ([6, 7, 8, 9], [9, 10], [6, 5, 4])
    training, device, exact = model.training, model.device, next(model.parameters()).dtype is torch.float32
    ids = torch.tensor([[*shared, *(t for end in ends for t in end)]], device=device)
    at = torch.tensor([[*range(3), *(3 + i for end in ends for i in range(len(end)))]], device=device)
    alone = torch.tensor([[*shared, *ends[2]]], device=device)
    try:
        with blocked(model.train()), layout(Blocks(3, tuple(map(len, ends)))):  # dropout of attention shows in training
            model(input_ids=ids, position_ids=at, use_cache=False)
            got = model.eval()(input_ids=ids, position_ids=at, use_cache=False).logits.float()[0, -3:]
        want = model(input_ids=alone, use_cache=False).logits.float()[0, -3:]
    except (Unsuitable, TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        model.train(training)
    return bool((got - want).abs().max() <= (1e-3 if exact else 5e-2) * want.abs().max())


def _window(config: Any, otherwise: int) -> int:
    return getattr(config, "sliding_window", None) or otherwise
