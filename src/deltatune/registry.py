"""Methods, inits and callbacks by name, as recipes write them: `lora`, `lora_plus`, `PiSSA`.

They are found by looking through their packages, so that adding one is adding a file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from deltatune.core import Callback, Config, DeltatuneError, Init, Method, Router, nearest

T = TypeVar("T", bound=Config)
PACKAGES = ("methods", "inits", "routers", "callbacks")


def public(package: str) -> dict[str, type]:
    """The public classes that the modules of `deltatune.<package>` define: what `import deltatune` offers."""
    home = importlib.import_module(f"deltatune.{package}")
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(home.__path__):
        module = importlib.import_module(f"{home.__name__}.{info.name}")
        for name, value in vars(module).items():
            offered = isinstance(value, type) and issubclass(value, (Method, Init, Callback, Router))
            if offered and value.__module__ == module.__name__ and not name.startswith("_"):
                found[name] = value
    return found


def found() -> dict[str, type]:
    """Every method, init, router and callback, by name."""
    return {n: c for package in PACKAGES for n, c in public(package).items()}


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def named(kind: type[T], name: str) -> type[T]:
    """The class of that kind (`Method`, `Init`, `Callback`) called `name`, case and underscores aside."""
    known = {_plain(n): c for n, c in found().items() if issubclass(c, kind)}
    if _plain(name) not in known:
        names = {_plain(c.__name__): c.__name__ for c in known.values()}
        hint = nearest(_plain(name), names, 1) or f"; there are {', '.join(sorted(names.values()))}"
        for plain, real in names.items():
            hint = hint.replace(f"'{plain}'", f"'{real}'")
        raise DeltatuneError(f"no {kind.__name__.lower()} is called {name!r}{hint}")
    return known[_plain(name)]


def make(kind: type[T], spec: str | Mapping[str, Any]) -> T:
    """A value from a name, or from `{"name": …, option: value, …}`; nested specs make the inits and methods inside."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise DeltatuneError(f"{kind.__name__.lower()} {dict(spec)!r} has no 'name'")  # type: ignore[arg-type]
    cls = named(kind, str(options.pop("name")))
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in options:
        if key not in fields:
            raise DeltatuneError(f"{cls.__name__} has no option {key!r}{nearest(key, fields) or _offer(fields)}")
    return cls(**{k: _nested(fields[k].type, v) for k, v in options.items()})


def _nested(annotation: Any, value: Any) -> Any:
    text = str(annotation)
    for kind in (Init, Method):
        if kind.__name__ in text:
            if isinstance(value, (list, tuple)):
                return tuple(make(kind, v) for v in value)
            return make(kind, value) if value is not None else None
    return tuple(value) if isinstance(value, list) else value


def _offer(fields: Mapping[str, Any]) -> str:
    return f"; its options are {', '.join(fields)}"
