"""Initialisations that look at data: `DataInit`. `attach` leaves their deltas as if there were none; before the first
step of `fit`, or in `initialise`, batches run through the model and the factors are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.adapter import Adapter
from deltatune.core.callback import Callback, Events, Run, Trained
from deltatune.core.constant import Staged
from deltatune.core.errors import DeltatuneError
from deltatune.core.method import Init, Site
from deltatune.core.surgery import using
from deltatune.core.units import Sliced
from deltatune.storage import layers

Losses = Callable[[int], Iterator[Tensor]]
HELD = 2**30  # bytes of statistics at once; what is more takes several passes over the batches


_FACTORS = ("a", "b", "a0", "b0")


class Awaiting(Staged):
    """A product of `a` (r, in) and `b` (out, r) whose start, r included, may be left to data."""

    a: nn.Parameter
    b: nn.Parameter
    a0: Any  # a constant product that is taken off, as `b0`; None for none
    b0: Any

    def __init__(self) -> None:
        super().__init__()
        self.waits: DataInit | None = None

    @property
    def undecayed(self) -> tuple[str, ...]:  # type: ignore[override]
        """The factors of B A - B0 A0; the optimizer, which asks, is made before data are seen."""
        return ("a", "b") if self.a0 is not None or (self.waits is not None and self.waits.elsewhere) else ()

    def await_data(self, init: DataInit) -> None:
        self.waits, self.grows = init, (*type(self).grows, *_FACTORS)  # type: ignore[misc, assignment]

    @torch.no_grad()
    def start_at(self, a: Tensor) -> None:
        """Begin at B = 0 and these rows of A, as many as there are. The parameters are still the same objects."""
        self.a.data = self.a.new_empty(a.shape).copy_(a)  # in its own layout, which products round by
        self.b.data = self.b.new_zeros(len(self.b), len(a))

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        super().expect({n: shape for n, shape in shapes.items() if n in type(self).grows})
        if self.waits is None:
            return
        a, b, a0, b0 = (shapes.get(n) for n in _FACTORS)
        if not (a and b) or a[1:] != self.a.shape[1:] or b != (len(self.b), a[0]) or (a0 or a, b0 or b) != (a, b):
            raise DeltatuneError(f"factors of shapes {[*map(tuple, shapes.values())]} do not fit the weight")
        self.start_at(self.a.new_empty(a))
        self.a0, self.b0 = (torch.empty_like(self.a), torch.empty_like(self.b)) if a0 else (None, None)
        self.waits = None


@dataclass(frozen=True, eq=False)
class Waiting:
    """A low-rank delta that waits for data, and its module; `rows` of a fused projection are a site of their own."""

    path: str
    module: nn.Module
    delta: Any
    rows: Tensor | None = None

    def own(self, full: Tensor) -> Tensor:
        """The part of a tensor of the whole module, (out, in), that is this site's."""
        return full if self.rows is None else full.index_select(0, self.rows.to(full.device))

    @property
    def weight(self) -> Tensor:
        w = layers.read(self.module, "weight").detach()
        return self.own(w.to(torch.promote_types(w.dtype, torch.float32)))


@dataclass(frozen=True, kw_only=True)
class DataInit(Init):
    """An initialisation from up to `batches` micro-batches of the training data, or of `data`: a file, a `datasets`
    folder or a hub name, read as the training data are."""

    linear: ClassVar[bool] = True  # whether what it starts belongs to linear layers
    elsewhere: ClassVar[bool] = True  # whether it starts at a product that is then taken off, or at B = 0

    apart: ClassVar[bool] = False  # whether training data are none that it can start from

    batches: int = 8
    data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise DeltatuneError(f"{type(self).__name__}: batches must be at least 1, got {self.batches}")

    def start(self, delta: Any, site: Site) -> None:
        delta.await_data(self)

    def callbacks(self) -> Sequence[Callback]:
        return [Start(init=self)]

    def fill(self, sites: Sequence[Waiting], model: nn.Module, losses: Losses) -> None:
        """Start the deltas of `sites`; `losses(n)` runs up to n batches, from the first, as often as it is asked."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Start(Callback):
    """Fills what waits for `init` before the first step; a resumed run finds it in its checkpoint."""

    init: DataInit

    def start(self, run: Run) -> Events:
        return _Start(self.init)


class _Start(Events):
    def __init__(self, init: DataInit) -> None:
        self.init = init

    def on_train_start(self, run: Run) -> None:
        if run.step == 0 and run.adapter is not None:
            own = self.init.apart or self.init.data is not None
            _fill(self.init, run.model, run.adapter, None if own else run.losses)


def initialise(adapter: Adapter, losses: Losses, data: str | None = None) -> None:
    """Fill what waits for data, for loops other than `fit`, or from other data than are trained on.

    data: what the inits to fill have as their `data`; by default all are filled.

    losses: called with n, gives the losses of the first n batches one after another, each computed when it is asked
    for: `lambda n: (model(**batch).loss for batch in islice(loader, n))`.
    Raises DeltatuneError when nothing waits, because there is no such initialisation or it has had its data."""
    inits = [init for init in waiting(adapter) if data in (None, init.data)]
    if not inits:
        raise DeltatuneError(f"adapter {adapter.name!r}: nothing in it waits for data; attach it with such an init")
    with using(adapter.model, adapter.name):
        for init in inits:
            _fill(init, adapter.model, adapter, losses)


def waiting(adapter: Adapter) -> list[DataInit]:
    """The inits that have not had their data."""
    waits = (getattr(u, "waits", None) for _, unit in adapter.units() for u in unit.modules())
    return list(dict.fromkeys(init for init in waits if init is not None))


def _fill(init: DataInit, model: nn.Module, adapter: Trained, losses: Losses | None) -> None:
    name = type(init).__name__
    sites = [
        Waiting(path, module, delta, unit.rows if isinstance(unit, Sliced) else None)
        for path, module, unit, _ in adapter.sites()
        for delta in unit.modules()
        if getattr(delta, "waits", None) == init
    ]
    if not sites:  # filled by hand before
        return
    if losses is None and init.apart and init.data is None:
        raise DeltatuneError(
            f"{name} starts from other data than are trained on; name them by its option `data`, or call "
            "deltatune.initialise(adapter, losses) with theirs before training"
        )
    if losses is None:
        raise DeltatuneError(
            f"{name} starts from data, which this training loop does not offer; call "
            "deltatune.initialise(adapter, losses) before it, or train with deltatune.train"
        )
    for site in sites:
        if init.linear and not layers.is_linear(site.module):
            kind = layers.plain_class(type(site.module)).__name__
            raise DeltatuneError(f"{name}: {site.path!r} is a {kind}, no linear layer; leave it out of targets")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        init.fill(sites, model, losses)
    finally:
        for module, training in modes:
            module.training = training
    for site in sites:
        site.delta.waits = None


@contextmanager
def inputs(model: nn.Module, modules: Sequence[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, `see(module, x)` at each call of one of `modules`, x being (tokens, in), in fp32 or wider, without
    padding. Modules called in a row with the same input are given the same x. Nothing has a gradient."""
    mask: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None

    def begin(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        nonlocal mask, last
        given = kwargs.get("attention_mask")
        mask, last = (given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None), None

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        if last is None or last[0] is not args[0]:
            kept = args[0][mask] if mask is not None and args[0].shape[:-1] == mask.shape else args[0].flatten(0, -2)
            last = args[0], kept.detach().to(torch.promote_types(kept.dtype, torch.float32))
        see(module, last[1])

    handles: list[Any] = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [module.register_forward_pre_hook(hook) for module in modules]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: nn.Module, modules: Sequence[nn.Module], losses: Callable[[], Iterator[Tensor]]
              ) -> Iterator[tuple[nn.Module, Tensor]]:  # fmt: skip
    """(module, dL/dW') of each module, (out, in), summed over the batches; several passes if all would not fit."""
    for some in within(modules, lambda m: layers.read(m, "weight").numel()):
        sums: dict[nn.Module, Tensor] = {}

        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor, sums: dict[nn.Module, Tensor] = sums) -> None:
            x = args[0].detach().flatten(0, -2)

            def add(dy: Tensor) -> None:
                wide = torch.promote_types(x.dtype, torch.float32)
                g = dy.flatten(0, -2).to(wide).T @ x.to(wide)
                sums[module] = sums[module].add_(g) if module in sums else g

            if y.requires_grad:
                y.register_hook(add)

        handles = [module.register_forward_hook(hook) for module in some]
        before = [(p, p.grad) for p in model.parameters() if p.requires_grad]
        try:
            with torch.enable_grad():
                for loss in losses():
                    loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for p, grad in before:
                p.grad = grad
        yield from sums.items()


def within(modules: Sequence[nn.Module], numbers: Callable[[nn.Module], int]) -> Iterator[list[nn.Module]]:
    """`modules`, each once, in groups whose statistics, of so many numbers each, take up to `HELD` bytes."""
    group: list[nn.Module] = []
    size = 0
    for module in dict.fromkeys(modules):
        own = 4 * numbers(module)
        if group and size + own > HELD:
            yield group
            group, size = [], 0
        group.append(module)
        size += own
    yield group
