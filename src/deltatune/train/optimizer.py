"""AdamW, with its moments in fp32, or in 8 bits (Dettmers et al., ICLR 2022, arXiv:2110.02861).

An 8-bit moment is a code for each value and an fp32 scale for every 256; parameters below 4096 values keep fp32. Paged,
the moments leave the accelerator when its memory runs short and come back for the step (arXiv:2305.14314, sec. 3).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.adapter import Adapter
from deltatune.core.callback import Groups
from deltatune.core.errors import DeltatuneError
from deltatune.core.slot import slots
from deltatune.train.options import TrainOptions

SMALL, BLOCK = 4096, 256  # values: of a parameter that keeps fp32 moments, and of those that share a scale


def groups(trained: Sequence[nn.Parameter], adapter: Adapter | None, options: TrainOptions) -> Groups:
    """`trained`, of `adapter` or of the base, by their weight decay. Raises DeltatuneError if it would act on none."""
    spared = set(_undecayed(adapter)) if adapter is not None and options.weight_decay else set()
    decayed, rest = ([p for p in trained if (id(p) in spared) is own] for own in (False, True))
    if rest and not decayed:
        assert adapter is not None
        raise DeltatuneError(
            f"train.weight_decay has no effect on this {type(adapter.method).__name__}: all that it trains starts from "
            "the base and not from zero, so none of it decays; leave it out"
        )
    every = (decayed, options.weight_decay), (rest, 0.0)
    return [{"params": some, "lr": options.lr, "weight_decay": decay} for some, decay in every if some]


def _undecayed(adapter: Adapter) -> Iterator[int]:
    """Identities of the parameters whose zero is not the base; where its init has rewritten the base, of all."""
    for _, _, slot in slots(adapter.model):
        parts = [part for unit, _ in slot.pairs(adapter.name) for part in unit.modules()]
        for part in parts:
            for name, p in part.named_parameters(recurse=False):
                if adapter.name in slot.rewritten or name in getattr(part, "undecayed", ()):
                    yield id(p)


def make(groups: Groups, options: TrainOptions, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `options` name; groups have their `lr`. Raises DeltatuneError when its library is missing."""
    how: dict[str, Any] = {"betas": options.betas, "eps": options.eps}
    if options.optimizer == "adamw":
        floats = all(p.is_floating_point() for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, fused=floats and device.type in ("cuda", "cpu"), **how)  # type: ignore[arg-type]
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DeltatuneError(
            f"train.optimizer: {options.optimizer} needs bitsandbytes, which is not installed: "
            "pip install 'deltatune[quant]', or take adamw"
        )
    from bitsandbytes import optim

    paged = options.optimizer == "paged_adamw_8bit" and device.type == "cuda"  # elsewhere there is nothing to page
    made: torch.optim.Optimizer = (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **how)
    return made


def state_bytes(parameters: Iterable[Tensor], options: TrainOptions) -> int:
    """Bytes of both moments of each parameter."""
    if options.optimizer == "adamw":
        return sum(2 * p.numel() * p.element_size() for p in parameters)
    return sum(2 * (4 * n if n < SMALL else n + 4 * -(-n // BLOCK)) for n in (p.numel() for p in parameters))
