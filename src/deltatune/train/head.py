"""How the head of a language model is kept from making logits [b, T, vocabulary], which nobody needs whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from deltatune.core.select import SLOT
from deltatune.core.slot import Active, Slot, slots, switch_of
from deltatune.core.units import CALL, Delta
from deltatune.kernels.cross_entropy import Loss, head_cross_entropy, linear_cross_entropy
from deltatune.models.logits import Treatment, candidates, probe, treatment
from deltatune.routers.per_row import PerRow
from deltatune.storage.layers import plain_class

_Key = tuple[Any, ...]
_KNOWN: WeakKeyDictionary[nn.Module, tuple[_Key, Treatment | None]] = WeakKeyDictionary()


def head_of(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def loss_by_chunks(model: Any, inputs: Mapping[str, Any], targets: Tensor, ignored: int, smoothing: float = 0.0
                   ) -> Loss | None:  # fmt: skip
    """The loss of `targets` [b, T] with logits made, and used up, some rows at a time; None where it cannot be had so.

    The hidden states are taken at the door of the head, and what the model would do to the logits is done here. Not
    where adapters at the head are more than its weight (rows or experts of their own, code around the call), where a
    hook of the model may read the logits, where the hidden states are not those of the targets, nor where the model
    treats its logits in a way that is not known. The last shows in what it makes of a probe, which is looked at once
    for the model and the adapters in effect; if then the answer is None, torch's random numbers are as they were."""
    head: Any = head_of(model)
    switch = switch_of(model)
    active = Active() if switch is None else switch.active()
    if head is None or model._forward_hooks:  # a hook may read the logits
        return None
    rows = isinstance(active.router, PerRow)  # which names a batch's rows in its own order
    router, names = (None, sorted(active.names)) if rows else (active.router, active.names)
    used = () if switch is None else (router, *map(switch.records.get, names))
    key: _Key = candidates(model), rows, [ref(one) for one in used if one is not None]
    known, how = _KNOWN.get(model, ((), None))
    new = known != key
    if not (_acts_on_weights(model, head) if new else how):
        _KNOWN[model] = key, None
        return None

    cpu, (devices, states) = torch.get_rng_state(), get_device_states(targets)
    tap = _Tap(targets.shape, rows=0 if _is_plain(head) else 1)
    with tap.at(head):
        logits = model(**inputs).logits
    if tap.hidden is None or tap.probe is None or logits.shape != tap.probe.shape:
        how = None
    elif new:
        how = treatment(model, tap.probe, logits)
    _KNOWN[model] = key, how
    if how is None or tap.hidden is None:
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
        return None

    return _loss(head, tap.hidden, targets, how, how.shift(model), ignored=ignored, smoothing=smoothing)


def _loss(head: Any, hidden: Tensor, targets: Tensor, how: Treatment, shift: Tensor | None, **given: Any) -> Loss:
    """That of hidden states as they come to the head."""
    options: dict[str, Any] = {"scale": how.scale, "cap": how.cap, **given}
    if _is_plain(head) and head.weight.device == hidden.device:
        bias = head.bias if shift is None else shift if head.bias is None else head.bias + shift
        return linear_cross_entropy(hidden, head.weight, targets, bias, **options)

    def call(x: Tensor) -> Tensor:
        y = head(x[None])[0]
        return y if shift is None else y + shift

    return head_cross_entropy(call, hidden, targets, **options)


def _units(module: nn.Module) -> list[tuple[Any, str]]:
    """The active units at `module`, merged ones aside, and where each acts."""
    slot = module._modules.get(SLOT)
    return [pair for n in slot.switch.active().names for pair in slot.at(n)] if isinstance(slot, Slot) else []


def _acts_on_weights(model: nn.Module, head: nn.Module) -> bool:
    """Whether the active adapters leave alone what the head returns: they may begin by changing nothing in it."""
    for _, module, slot in slots(model):
        if any(head is m for m in module.modules()):
            units = _units(module)
            routed = slot.switch.active().router is not None
            if units and (routed or any(at == CALL or not isinstance(unit, Delta) for unit, at in units)):
                return False
    return True


def _is_plain(head: Any) -> bool:
    """Whether calling it is a product with its weight, plus its bias, and nothing that others have added."""
    added = _units(head) or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return plain_class(type(head)) is nn.Linear and not added and type(head.weight) in (Tensor, nn.Parameter)


class _Tap:
    """Takes the hidden states [b, T, hidden] that come to a head, lets `rows` of them in, and returns a probe."""

    def __init__(self, shape: torch.Size, rows: int) -> None:
        self.shape, self.rows = shape, rows
        self.hidden: Tensor | None = None
        self.probe: Tensor | None = None

    @contextmanager
    def at(self, head: nn.Module) -> Iterator[None]:
        handles = head.register_forward_pre_hook(self._take), head.register_forward_hook(self._give)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.hidden is not None or len(args) != 1 or args[0].shape[:-1] != self.shape:
            return None
        (self.hidden,) = args
        return (args[0].detach().flatten(0, 1)[None, : self.rows],)

    def _give(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.hidden is None or self.probe is not None or not isinstance(output, Tensor):
            return None
        self.probe = probe(output)
        return self.probe


@contextmanager
def only(model: Any, trained: Tensor) -> Iterator[None]:
    """Inside, the model's head sees only the `trained` positions [b, T] of its hidden states, as [1, n, hidden].

    The head is called as ever, with the adapters on it, and the model caps or scales what it returns; all of that acts
    on each position alone. Not where rows have adapters of their own at the head, which need the rows, where a hook
    of the model may read the logits, nor where the hidden states are not those of the labels: there all are made."""
    head, switch = head_of(model), switch_of(model)
    rows = switch is not None and isinstance(switch.active().router, PerRow)
    if head is None or model._forward_hooks or (rows and not _acts_on_weights(model, head)):
        yield
        return
    places = trained.flatten().nonzero().flatten()

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].shape[:-1] != trained.shape:
            return None
        return args[0].flatten(0, 1).index_select(0, places.to(args[0].device))[None], *args[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
