"""Several adapters on the same inputs: the blocks below all of them are run once.

    h = blocks 0 ... k - 1 of the base,    y_t = blocks k ... L - 1 and the head of task t, of h

where k is the first block that an adapter changes: what AdapterDrop (arXiv:2010.11918, sec. 3) makes room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from deltatune.core import Adapter, DeltatuneError, Part, resolve, using


@torch.no_grad()
def under_each(model: nn.Module, names: Sequence[str], **inputs: Any) -> dict[str, Any]:
    """What `model(**inputs)` returns under each of the adapters `names`; their outputs may differ in shape.

    Computed once is what comes before the first module that any of them has a unit at, in whole blocks, and of an
    encoder-decoder in its encoder. The outputs hold no keys and values. Other threads may use the model meanwhile.
    Raises DeltatuneError for a model in training mode, whose dropout is drawn anew for each, and for a cache."""
    if model.training:
        raise DeltatuneError("under_each: the model is in training mode; call model.eval()")
    if inputs.get("past_key_values") is not None:
        raise DeltatuneError("under_each: past_key_values: blocks that are left out would not see their cache")
    trunk, found = _Trunk(model, names), dict[str, Any]()
    for name in dict.fromkeys(names):
        with using(model, name), trunk.left_out() if found else trunk.noted():
            found[name] = model(**inputs)
        if getattr(found[name], "past_key_values", None) is not None:
            found[name].past_key_values = None
    return found


class _Trunk:
    """The blocks that end before the first unit of any of the adapters, and what the last of them returned."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.sites = {id(m): m for n in names for _, m, _, _ in Adapter(model, n).sites()}.values()
        self.blocks, self.thread = _first_stack(model), get_ident()
        self.below: list[nn.Module] = []
        self.output: Any = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, the model is called once as usual, by this thread."""
        reached: list[nn.Module] = []

        def reach(module: nn.Module, args: Any) -> None:
            if get_ident() == self.thread:
                reached.append(module)

        def end(block: nn.Module, args: Any, output: Any) -> None:
            if get_ident() != self.thread or reached:
                return
            if block in self.below:  # layers that share their weights are one module: it cannot be left out once
                self.below.clear()
                reached.append(block)
            else:
                self.below.append(block)
                self.output = output

        with ExitStack() as stack:
            for site in self.sites:
                stack.callback(site.register_forward_pre_hook(reach).remove)
            for block in self.blocks:
                stack.callback(block.register_forward_hook(end).remove)
            yield

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, each of `below` returns at once, to this thread, what the last of them did."""
        with ExitStack() as stack:
            for block in self.below:
                before, run = block.__dict__.get("forward"), block.forward

                def forward(*args: Any, run: Any = run, **kwargs: Any) -> Any:
                    return self.output if get_ident() == self.thread else run(*args, **kwargs)

                stack.callback(_restore, block, before)
                block.__dict__["forward"] = forward
            yield


def _restore(block: nn.Module, before: Any) -> None:
    if before is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = before


def _first_stack(model: nn.Module) -> list[nn.Module]:
    """The blocks in order, of an encoder-decoder the encoder's; none where the architecture is not known."""
    try:
        found = resolve(model, Part("block"))
    except DeltatuneError:
        return []
    stack = found[0].path.rpartition(".")[0]
    return [m.module for m in found if m.path.rpartition(".")[0] == stack]
