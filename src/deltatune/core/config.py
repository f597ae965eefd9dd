"""`Config`: a frozen value that can be written to JSON and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.plugins import load_types

_CLASSES: dict[str, type[Config]] = {}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen, serialisable value, found again by its class name. Lists become tuples, so equality is by value."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if isinstance(v := getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(v))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: `{"type": class name, field: value, ...}`; a callable or a class in a field is refused."""
        return {"type": type(self).__name__} | {f.name: _encode(self, f.name) for f in dataclasses.fields(self)}

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Any:
        """The value that `to_dict` wrote. Unknown types and fields raise, with the nearest name."""
        name = d.get("type", "")
        if name not in _CLASSES:
            load_types()
        if name not in _CLASSES:
            raise DeltatuneError(f"unknown type {name!r}{nearest(name, _CLASSES)}")
        cls = _CLASSES[name]
        known = {f.name for f in dataclasses.fields(cls)}
        for key in d:
            if key != "type" and key not in known:
                raise DeltatuneError(f"{name} has no option {key!r}{nearest(key, known)}")
        return cls(**{k: _decode(v) for k, v in d.items() if k != "type"})


def config_classes() -> Mapping[str, type[Config]]:
    """Every class that `from_dict` can build, by name."""
    return dict(_CLASSES)


def _encode(owner: Config, field: str) -> Any:
    def enc(v: Any) -> Any:
        if isinstance(v, Config):
            return v.to_dict()
        if isinstance(v, Mapping):
            return {str(k): enc(i) for k, i in v.items()}
        if isinstance(v, (tuple, list)):
            return [enc(i) for i in v]
        if v is None or isinstance(v, (str, int, float, bool)):
            return v
        raise DeltatuneError(f"{type(owner).__name__}.{field}: {v!r} cannot be written to a file; give names instead")

    return enc(getattr(owner, field))


def _decode(v: Any) -> Any:
    if isinstance(v, Mapping):
        return Config.from_dict(v) if "type" in v else {k: _decode(i) for k, i in v.items()}
    return tuple(_decode(i) for i in v) if isinstance(v, list) else v
