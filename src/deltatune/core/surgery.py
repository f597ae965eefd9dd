"""Attach, activate, merge, detach. No other module changes a live model. Everything is in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from deltatune.core import classes
from deltatune.core.adapter import Adapter
from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.merging import Lost, attributes, put_back, tied, write
from deltatune.core.method import Method, Site, Union
from deltatune.core.select import Match, resolve, walk
from deltatune.core.slot import Active, Record, Slot, Switch, graft, set_switch, slots, switch_of, ungraft
from deltatune.core.units import CALL, Delta, Intervention, Router, Sliced
from deltatune.storage import layers


class Point(Protocol):
    """A place beside module calls where interventions can run, such as the attention function."""

    def install(self, model: nn.Module) -> None: ...
    def remove(self, model: nn.Module) -> None: ...


_POINTS: dict[str, Point] = {}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def register_point(name: str, point: Point) -> None:
    _POINTS[name] = point


@dataclass(frozen=True)
class PlannedSite:
    """What an adapter would do at one place; `parameters` is the number trained there."""

    path: str
    at: str
    kind: str
    out: int | None
    in_: int | None
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What `attach` would touch. `trained` counts parameters shared by several sites once; `total` is the base's."""

    sites: tuple[PlannedSite, ...]
    trained: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trained / max(1, self.total)
        lines = [f"{len(self.sites)} sites, {self.trained:,} trained parameters ({share:.3f} % of {self.total:,})"]
        lines += [f"  {s.path or '(model)'}  {s.kind}.{s.at}  {s.out} x {s.in_}  {s.parameters:,}" for s in self.sites]
        return "\n".join(lines)


def _sites(model: nn.Module, part: Method, dtype: torch.dtype | None, device: str | None = None) -> list[Site]:
    select, found = part.select(model), []
    if select == () != part.targets:
        return []
    matches = resolve(model, select, part.usual)
    for match in matches:
        around = [at for at in part.at if at in _POINTS or at == CALL]
        if around and isinstance(match.module, _CONTAINERS):
            raise DeltatuneError(_container(part, match))
        for at in part.at:
            if at in around or isinstance(getattr(match.module, at, None), torch.Tensor):
                own = _float(match.module, at)
                found.append(Site(model, match.path, match.module, at, match.rows, dtype or _at_least_fp32(own.dtype),
                                  torch.device(device or own.device)))  # fmt: skip
    if not found:
        if container := next((m for m in matches if isinstance(m.module, _CONTAINERS)), None):
            raise DeltatuneError(_container(part, container))
        raise DeltatuneError(
            f"{type(part).__name__}: none of the modules that {part.targets or part.usual!r} selects "
            f"has a {' or '.join(part.at)}{part.otherwise}"
        )
    return found


def _container(part: Method, match: Match) -> str:
    kind = type(match.module).__name__
    return (
        f"{type(part).__name__}: {match.path!r} is a container ({kind}); "
        "target the module that runs it, or the modules in it"
    )


def _float(module: nn.Module, at: str) -> torch.Tensor:
    """A tensor whose precision and place an adapter at this module shares."""
    own = getattr(module, at, None) if at != CALL else None
    if isinstance(own, torch.Tensor) and own.is_floating_point():
        return own
    held = list(module.parameters())  # quantised weights are of whole numbers
    return next((p for p in held if p.is_floating_point()), torch.empty(0, device=held[0].device if held else None))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _unit(part: Method, site: Site, shared: nn.Module | None) -> Intervention:
    unit = part.build(site, shared)
    if site.rows is None:
        return unit
    if not isinstance(unit, Delta) or not layers.is_linear(site.module):
        raise DeltatuneError(
            f"{type(part).__name__}: {site.path!r}: only a delta of a linear layer can act on some rows"
        )
    return Sliced(unit, site.rows.to(site.device), layers.read(site.module, site.at).shape[0])


def attach(model: nn.Module, method: Method, name: str = "default", *, dtype: torch.dtype | None = None) -> Adapter:
    """Freeze `model`, graft `method` onto every module its targets select, and make it the active adapter.

    dtype: the precision of the adapter's parameters; by default fp32, or the base's own if wider.
    Raises DeltatuneError, and leaves the model as it was, when the name is taken or a target does not fit.
    """
    known = switch_of(model)
    switch = known or Switch()
    if not name or "." in name or name in dir(nn.ModuleDict):
        raise DeltatuneError(f"{name!r} cannot name an adapter; use letters, digits and dashes")
    if name in switch.records:
        raise DeltatuneError(f"adapter {name!r} is already attached; detach it first, or choose another name")
    shared, built, every = nn.ModuleDict(), [], []
    try:
        for i, part in enumerate(method.parts()):
            sites = _sites(model, part, dtype)
            every += sites
            if (common := part.shared(sites)) is not None:
                shared[str(i)] = common
            built += [(site, _unit(part, site, common)) for site in sites]
        if not built:
            raise _nowhere(model, method)
        for place in dict.fromkeys(site.at for site, _ in built if site.at in _POINTS and site.at not in switch.points):
            _POINTS[place].install(model)  # first, because it may refuse the model
            switch.points += (place,)
    except Exception:
        for site in every:
            put_back(site.module, site.replaced)
        raise
    if known is None:
        switch.thawed = tuple(_freeze(model))
    set_switch(model, switch)
    for site, unit in built:
        slot = graft(site.module, switch)
        if name not in slot.places:
            slot.units[name], slot.places[name] = nn.ModuleList(), []
        slot.units[name].append(unit)  # type: ignore[operator]
        slot.places[name].append(site.at)
        if site.replaced:
            slot.rewritten[name] = site.replaced
        unit.train(site.module.training)
    switch.records[name] = Record(method, shared, built[0][0].dtype)
    classes.put(model, switch, Active((name,)))
    return Adapter(model, name)


def _nowhere(model: nn.Module, method: Method) -> DeltatuneError:
    parts = method.methods if isinstance(method, Union) else (method,)
    told = ", ".join(f"{type(m).__name__}(targets={m.targets!r})" for m in parts) or "no method"
    return DeltatuneError(
        f"{type(method).__name__}: {told} finds no module of {type(model).__name__}; name some by `targets`"
    )


def _freeze(model: nn.Module) -> Iterator[str]:
    for path, module in walk(model):
        layers.settle(module)
        for n, p in module._parameters.items():
            if p is not None and p.requires_grad:
                p.requires_grad_(False)
                yield f"{path}.{n}".lstrip(".")


def plan(model: nn.Module, method: Method, *, dtype: torch.dtype | None = None) -> Plan:
    """What `attach` would touch, without touching it: nothing is allocated."""
    rows, shared_size = [], 0
    for part in method.parts():
        sites = _sites(model, part, dtype, device="meta")
        common = part.shared(sites)
        mine = {id(p) for p in common.parameters()} if common is not None else set()
        shared_size += sum(p.numel() for p in common.parameters()) if common is not None else 0
        for site in sites:
            unit = _unit(part, site, common)
            n = sum(p.numel() for p in unit.parameters() if id(p) not in mine)
            w = getattr(site.module, "weight", None)
            out, in_ = (site.shape.out, site.shape.in_) if isinstance(w, torch.Tensor) else (None, None)
            rows.append(PlannedSite(site.path, site.at, type(site.module).__name__, out, in_, n))
    if not rows:
        raise _nowhere(model, method)
    held = ((m, n, p) for _, m in walk(model) for n, p in m._parameters.items() if p is not None)
    sizes = {id(p): layers.shape(m, n).numel() for m, n, p in held}  # of weights, not of their codes
    return Plan(tuple(rows), sum(r.parameters for r in rows) + shared_size, sum(sizes.values()))


def _known(model: nn.Module, names: Sequence[str]) -> Switch:
    switch = switch_of(model)
    if switch is None:
        raise DeltatuneError(f"{type(model).__name__} has no adapter")
    for n in names:
        if n not in switch.records:
            raise DeltatuneError(f"no adapter {n!r}{nearest(n, switch.records)}; attached: {', '.join(switch.records)}")
    return switch


def _active(model: nn.Module, names: tuple[str, ...], router: Router | None) -> tuple[Switch, Active]:
    if router is not None and router.names:
        names = tuple(n for n in dict.fromkeys(router.names) if n is not None)
    switch = _known(model, names)
    if router is not None:
        router.check({n: switch.records[n].method for n in names})
    active = Active(names, router)
    classes.agree(model, switch, active)
    return switch, active


def activate(model: nn.Module, *names: str, router: Router | None = None) -> None:
    """Make `names` the adapters in effect, stacked in order or combined by `router`; none: the base alone.

    Costs the same whatever the number of layers and adapters. `PerRow([...])` gives each row of a batch its own.
    """
    classes.put(model, *_active(model, names, router))


@contextmanager
def using(model: nn.Module, *names: str, router: Router | None = None) -> Iterator[None]:
    """As `activate`, for this thread's calls inside the block only: what a server wraps each request in.

    A backward pass through activation checkpointing runs the forward again, so it belongs inside the block too.
    """
    switch, active = _active(model, names, router)
    with switch.using(active):
        yield


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters, by name."""
    switch = switch_of(model)
    return {n: Adapter(model, n) for n in switch.records} if switch else {}


@torch.no_grad()
def merge(model: nn.Module, *names: str, keep: bool = True) -> float:
    """Write W' of `names` (default: the active adapters) into the base weights, in fp32 or wider, then rounded.

    What acts in training alone is left out; what is said in attributes of the base (interpolated positions) is set.
    keep: remember what was replaced, for `unmerge`; otherwise the adapter is detached and the base is changed for good.
    Returns what is lost where weights are quantised, and warns of it: |stored W' - W'| / |W' - W|, 0 without such.
    Raises, with nothing written, when an adapter acts on activations or would write a non-finite weight.
    """
    switch, lost = _known(model, names), Lost()
    for name in names or switch.active().names:
        if name in switch.merged:
            continue
        mine = [(path, m, s) for path, m, s in slots(model) if name in s.places]
        for path, module, slot in mine:
            for unit, _ in slot.pairs(name):
                attributes(path, module, unit)  # raises, before anything is written
        shared = tied(model)
        written: list[tuple[nn.Module, Slot]] = []
        try:
            for path, module, slot in mine:
                slot.merged[name] = []
                written.append((module, slot))
                for unit, at in slot.pairs(name):
                    for replaced in write(path, module, unit, at, shared, lost):
                        slot.merged[name].append(replaced)
        except Exception:
            _restore(written, name)
            raise
        if keep:
            switch.merged.append(name)
        else:
            classes.keep(model, switch, name)
            for _, _, slot in mine:
                del slot.merged[name]
                slot.rewritten.pop(name, None)
            detach(model, name)
    classes.tell(model, switch)
    if lost.sites:
        warnings.warn(
            f"merged into {lost.sites} quantised weights: rounding them again lost {lost.share:.1%} of the change; "
            "`deltatune merge` writes the model without quantisation and loses nothing", stacklevel=3
        )  # fmt: skip
    return lost.share


def _restore(written: Sequence[tuple[nn.Module, Slot]], name: str) -> None:
    for module, slot in written:
        put_back(module, slot.merged.pop(name, []))


@torch.no_grad()
def unmerge(model: nn.Module, *names: str) -> None:
    """Restore the exact base weights, bit for bit; default: everything merged. The last merged comes off first."""
    switch = _known(model, names)
    for name in reversed(switch.merged) if not names else reversed(names):
        if name not in switch.merged:
            raise DeltatuneError(f"adapter {name!r} is not merged")
        if switch.merged[-1] != name:
            raise DeltatuneError(f"adapter {switch.merged[-1]!r} was merged over {name!r}; unmerge it first")
        _restore([(m, s) for _, m, s in slots(model)], name)
        switch.merged.pop()
    classes.tell(model, switch)


def detach(model: nn.Module, *names: str) -> None:
    """Remove adapters (default: all); a module left without any becomes the ordinary module it was, bit for bit."""
    switch = _known(model, names)
    for name in names or tuple(switch.records):
        if name in switch.merged:
            unmerge(model, name)
        if over := next((n for *_, slot in slots(model) if name in slot.rewritten for n in slot.merged), None):
            raise DeltatuneError(f"adapter {over!r} was merged over {name!r}; unmerge it first")
        for _, module, slot in list(slots(model)):
            put_back(module, slot.rewritten.pop(name, []))
            if name in slot.places:
                del slot.units[name], slot.places[name]
            if not slot.places:
                ungraft(module)
        del switch.records[name]
        if name in switch.current.names:
            classes.put(model, switch, Active(tuple(n for n in switch.current.names if n != name)))
    if not switch.records:
        for place in switch.points:
            _POINTS[place].remove(model)
        own = dict(model.named_parameters())
        for path in switch.thawed:
            if path in own:  # not when a part of the model was copied out
                own[path].requires_grad_(True)
        set_switch(model, None)
