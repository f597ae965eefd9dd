"""The root of a model, given a subclass of its own class as core does with modules; what transformers sees there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import trainer_utils

from deltatune.core.slot import Grafted
from deltatune.core.slot import _revive as _revive_grafted
from deltatune.storage.layers import plain_class


class Rooted(nn.Module):
    """Base of the classes that are put over a model's own: `peft_model.PeftModel` and its kinds."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, under = type(self).__bases__
        return _revive, (kind, plain_class(under), isinstance(self, Grafted)), self.__dict__.copy()


def graft(model: Any, kind: type[Rooted]) -> None:
    model.__class__ = _over(kind, type(model))
    _teach_trainer()


def ungraft(model: Any) -> None:
    model.__class__ = type(model).__bases__[1]


@contextmanager
def ungrafted(model: Any) -> Iterator[None]:
    """Within, the root is of its own class, so that core can graft it or give its class back."""
    kind = type(model).__bases__[0]
    ungraft(model)
    try:
        yield
    finally:
        model.__class__ = _over(kind, type(model))


_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


def _over(kind: type[Rooted], under: type[nn.Module]) -> type[nn.Module]:
    if (kind, under) not in _CLASSES:
        _CLASSES[kind, under] = _made(kind, under)
    return _CLASSES[kind, under]


def _made(kind: type[Rooted], under: Any) -> type[nn.Module]:
    plain: Any = plain_class(under)

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._run(functools.partial(under.forward, self), *args, **kwargs)

    # transformers finds tasks, labels and columns by the class's name and the signature of its forward
    body = {"forward": forward, "plain_class": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (kind, under), body)


def _revive(kind: type[Rooted], plain: type[nn.Module], grafted: bool) -> Any:
    return object.__new__(_over(kind, type(_revive_grafted(plain)) if grafted else plain))


class BaseView:
    """`model.base_model`: the backbone that transformers means by it, with what PEFT's own wrapper offers beside."""

    _walks = tuple(f"{do}_{what}" for do in ("get", "set") for what in ("encoder", "decoder", "input_embeddings"))

    def __init__(self, model: Any, backbone: Any) -> None:
        self.model, self.backbone = model, backbone

    def __getattr__(self, name: str) -> Any:
        model, backbone = self.__dict__["model"], self.__dict__["backbone"]
        if hasattr(type(model).__bases__[0], name):
            return getattr(model, name)
        if backbone is model and name in self._walks:  # transformers asks its base model only where that is another
            raise AttributeError(name)
        return getattr(backbone, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return other is self.backbone or (isinstance(other, BaseView) and other.model is self.model)

    def __hash__(self) -> int:
        return hash(self.backbone)


def _teach_trainer() -> None:
    """Make transformers' Trainer treat these models as PEFT's own: checkpoints, resuming, the best model.

    It asks `_is_peft_model`, which knows the classes of the package `peft` alone, and has no other way in.
    """
    known = trainer_utils._is_peft_model
    ours = known if hasattr(known, "theirs") else _or_rooted(known)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "_is_peft_model" in vars(module):
            module._is_peft_model = ours  # type: ignore[attr-defined]


def _or_rooted(theirs: Any) -> Any:
    def is_peft_model(model: Any) -> bool:
        return isinstance(model, Rooted) or theirs(model)

    is_peft_model.theirs = theirs  # type: ignore[attr-defined]
    return is_peft_model
