"""Values that describe an adapter before it touches a model: `Method`, `Union`, `Init`, and `Site`, which they get."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.callback import Callback
from deltatune.core.config import Config
from deltatune.core.errors import DeltatuneError
from deltatune.core.select import SLOT, Select
from deltatune.core.units import ATTENTION, CALL, Intervention
from deltatune.storage import checkpoints, layers


def matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that is, or ends, a module's path."""
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", path)), default)


@dataclass(frozen=True)
class Shape:
    """What a unit must know to allocate its parameters."""

    out: int
    in_: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def like(self) -> dict[str, Any]:
        """Keyword arguments for a tensor factory: the adapter's precision and place."""
        return {"dtype": self.dtype, "device": self.device}


@dataclass(frozen=True)
class Site:
    """One place an adapter touches: a module by its path, and `at`, the parameter a delta replaces, or the place
    ("call", "attention") an intervention surrounds. `rows` of a fused projection are a site of their own."""

    model: nn.Module
    path: str
    module: nn.Module
    at: str = "weight"
    rows: Tensor | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    replaced: list[tuple[str, nn.Parameter]] = field(default_factory=list, compare=False)  # by `write`

    @property
    def weight(self) -> Tensor:
        """The base's parameter, (out, in), detached."""
        w = layers.read(self.module, "weight" if self.at in (CALL, ATTENTION) else self.at).detach()
        return (w if self.rows is None else w[self.rows.to(w.device)]).to(self.device)

    @property
    def shape(self) -> Shape:
        out, *in_ = layers.shape(self.module, "weight" if self.at in (CALL, ATTENTION) else self.at)
        return Shape(out if self.rows is None else len(self.rows), in_[0] if in_ else 1, self.dtype, self.device)

    @property
    def like(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device}

    @property
    def quantised(self) -> bool:
        return layers.is_quantised(self.module)

    def original(self, source: str | None = None) -> Tensor:
        """The weight before it was quantised, (out, in), from the folder or hub name that the base came from."""
        given = source or getattr(self.model, "name_or_path", None)
        folder = checkpoints.folder_of(given) if given else None
        prefix, name = getattr(self.model, "base_model_prefix", ""), f"{self.path}.weight".lstrip(".")
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        if folder is None or (w := checkpoints.tensor(folder, names)) is None:
            raise DeltatuneError(
                f"{self.path}: its weight before quantisation is not in {given or 'a folder'}; give the init "
                "`source`, the folder or hub name of the base's safetensors files"
            )
        w = (w.T if layers.was_transposed(self.module) else w).to(self.device)
        return w if self.rows is None else w[self.rows.to(w.device)]

    def write(self, w: Tensor) -> None:
        """Replace the base's quantised weight by `w` for as long as the adapter is attached."""
        slot: Any = self.module._modules.get(SLOT)
        if taken := [] if slot is None else [*slot.merged, *slot.rewritten]:
            raise DeltatuneError(f"{self.path}: its weight is that of adapter {taken[0]!r}; unmerge or detach it first")
        if self.rows is not None:
            raise DeltatuneError(f"{self.path}: some rows of a quantised weight cannot be replaced alone; target all")
        old = rewrite(self.path, self.module, w)
        if not self.replaced:
            self.replaced.append(("weight", old))

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return getattr(self.module, "config", None) or getattr(self.model, "config", None)


def rewrite(path: str, module: nn.Module, w: Tensor) -> nn.Parameter:
    """Quantise `w` in place of a quantised weight; the parameter that was there, which put back restores it."""
    if not layers.is_writable(module, "weight"):
        raise DeltatuneError(
            f"{path}: {type(module._parameters['weight']).__name__} is packed for one kernel and cannot be made anew; "
            "load the base without quantisation"
        )
    old = module._parameters["weight"]
    layers.write(module, "weight", w)
    assert old is not None
    return old


@dataclass(frozen=True, kw_only=True)
class Init(Config):
    """HOW it starts: fills the factors of a low-rank delta, given the base weight (out, in)."""

    def __call__(self, delta: Any, w: Tensor) -> None:
        raise NotImplementedError

    def callbacks(self) -> Iterable[Callback]:
        """What fills the factors later, once there are data: see `DataInit`."""
        return ()

    def start(self, delta: Any, site: Site) -> None:
        """For an init that needs more of its site than the weight."""
        self(delta, site.weight)


@dataclass(frozen=True, kw_only=True)
class Method(Config):
    """A configuration that builds one unit per site: the whole public API of a method."""

    targets: Select = None

    lr: ClassVar[float] = 1e-3  # that suits the defaults, with AdamW, on a base a few hundred wide: see docs/compare.md
    usual: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")  # parts that `targets=None` means
    at: ClassVar[tuple[str, ...]] = ("weight",)  # parameters a delta replaces, or ("call",), or ("attention",)
    otherwise: ClassVar[str] = ""  # what to do instead, said where no module has any of these

    def select(self, model: nn.Module) -> Select:
        """`targets`, or what they mean on this model; () for nowhere."""
        return self.targets

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        """State that all sites of one adapter share (VeRA's A and B, a vector bank, a gate network)."""
        return None

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        raise NotImplementedError

    def callbacks(self) -> Iterable[Callback]:
        """What training this method needs beside its loss."""
        return ()

    def parts(self) -> Sequence[Method]:
        return (self,)

    def classes(self) -> tuple[str, ...]:
        """The names of the classes that its head, or that of its `inner` method, tells apart; () if it has none."""
        inner = getattr(self, "inner", None)
        return inner.classes() if isinstance(inner, Method) else ()

    def flat(self) -> Method:
        """The method of an adapter whose networks `flatten` has dropped."""
        return self

    def portable(self, units: Sequence[Intervention]) -> Method:
        """The method of an adapter with these units, as its file says it: without need of anything beside that file."""
        return self


@dataclass(frozen=True, kw_only=True)
class Union(Method):
    """Several methods under one name: MAM, UniPELT, LongLoRA, LoRA plus a trained head."""

    methods: tuple[Method, ...] = ()

    def parts(self) -> Sequence[Method]:
        return [p for m in self.methods for p in m.parts()]

    def callbacks(self) -> Iterable[Callback]:
        return [c for m in self.methods for c in m.callbacks()]

    def classes(self) -> tuple[str, ...]:
        return next((own for m in self.methods if (own := m.classes())), ())

    def flat(self) -> Method:
        return replace(self, methods=tuple(m.flat() for m in self.methods))

    def portable(self, units: Sequence[Intervention]) -> Method:
        return replace(self, methods=tuple(m.portable(units) for m in self.methods))
