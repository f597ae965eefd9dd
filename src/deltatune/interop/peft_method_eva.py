"""PEFT's `init_lora_weights="eva"`: a plain LoRA until `initialize_lora_eva_weights` gives it data.

The directions are the paper's: PEFT takes the mean off the inputs first, and leaves out layers that get no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from deltatune.core import Adapter, DeltatuneError
from deltatune.core.start import initialise
from deltatune.inits.eva import EVA
from deltatune.interop.peft_config import LoraConfig

_MOST = 10_000  # batches; PEFT goes round until every direction is done


def eva(config: LoraConfig) -> EVA:
    own = config.eva_config
    for name, only in (("whiten", False), ("adjust_scaling_factors", True)):
        if (value := getattr(own, name)) != only:
            raise DeltatuneError(f"EvaConfig.{name}={value!r} is not offered; give {only}")
    return EVA(batches=_MOST, rho=own.rho, tau=own.tau)


def forward_fn_dict(model: Any, inputs: Any) -> Any:
    return model(**inputs)


def initialize_lora_eva_weights(model: Any, dataloader: Iterable[Any] | None = None, eva_state_dict: Any = None,
                                forward_fn: Callable[[Any, Any], Any] = forward_fn_dict, adapter_name: str = "default",
                                gather_distributed_inputs: bool = True, show_progress_bar: bool = True,
                                **kwargs: Any) -> None:  # fmt: skip
    """Start a LoRA, attached with `init_lora_weights="eva"`, at the leading directions of its layers' inputs.

    Raises DeltatuneError for an adapter without that start, and for options that are not offered.
    """
    given = {"eva_state_dict": eva_state_dict} | kwargs
    if asked := [name for name, value in given.items() if value is not None]:
        raise DeltatuneError(f"initialize_lora_eva_weights: {asked[0]} is not offered; give the data as dataloader")
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "init_lora_weights", None) != "eva":
        raise DeltatuneError(f"adapter {adapter_name!r}: give its LoraConfig init_lora_weights='eva'")
    if dataloader is None:
        raise DeltatuneError("initialize_lora_eva_weights: give dataloader, the batches to start from")
    data, adapter = dataloader, Adapter(model, adapter_name)

    def losses(n: int) -> Iterator[Tensor]:
        for batch in islice(cycle(data), n):
            forward_fn(model, _placed(batch, model, config))
            yield torch.zeros(())

    initialise(adapter, losses)
    ranks = {path: (len(unit.a), unit.s * len(unit.a)) for path, unit in _factors(adapter)}
    config.rank_pattern = {path: r for path, (r, _) in ranks.items() if r != config.r}
    config.alpha_pattern = {path: alpha for path, (_, alpha) in ranks.items() if alpha != config.lora_alpha}


def _factors(adapter: Adapter) -> Iterator[tuple[str, Any]]:
    for path, _, unit, _ in adapter.sites():
        yield from ((path, part) for part in unit.modules() if hasattr(part, "a") and hasattr(part, "b"))


def _placed(batch: Any, model: Any, config: LoraConfig) -> Any:
    """The batch where the model is. Raises where labels hide tokens from PEFT that their mask shows."""
    if not isinstance(batch, dict):
        return batch
    if config.eva_config.use_label_mask and "labels" in batch:
        hidden = batch["labels"] == config.eva_config.label_mask_value
        seen = batch.get("attention_mask", torch.ones_like(hidden)).bool()
        if hidden.shape != seen.shape or bool((hidden & seen).any()):
            raise DeltatuneError(
                "EvaConfig.use_label_mask=True: the labels hide tokens that the attention mask shows, which is not "
                "offered; give use_label_mask=False, or batches without labels"
            )
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
