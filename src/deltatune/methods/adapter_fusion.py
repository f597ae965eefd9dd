"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning. Pfeiffer et al., EACL 2021. arXiv:2005.00247

    z = sum_n a_n W_v z_n,    a = softmax_n((W_q x + b_q) . (W_k z_n + b_k))                                (sec. 3.2)

z_n is what bottleneck adapter n adds, without its residual, for their common input x; z is added in its place. The N
adapters, trained before, each alone, and the base are frozen; W_q, W_k, W_v of each site learn which adapter helps a
token, with 0.01 |I - W_v|_F^2 for each site in the loss: see `routers.adapter_fusion`. Task heads are not fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core import Adapter, Callback, DeltatuneError, Intervention, Method, Select, Site, Union, attach
from deltatune.methods.side_by_side import Fusion, Units
from deltatune.methods.trained import Trained
from deltatune.routers.adapter_fusion import FusionRegularisation


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """`adapters`: names of adapters on the model, or folders of saved ones, copied as they are when this is attached.
    `methods`: theirs, where the tensors come later: in the file of a fusion. `saved`: what that holds; loading one
    without adapters needs them at the same names or folders."""

    at: ClassVar[tuple[str, ...]] = ("call",)
    lr: ClassVar[float] = 5e-5
    adapters: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()
    dropout: float = 0.1
    regularisation: float = 0.01
    saved: Literal["with adapters", "without adapters"] = "with adapters"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapters or len(set(self.adapters)) < len(self.adapters):
            raise DeltatuneError(f"AdapterFusion: adapters are those to fuse, each once, got {list(self.adapters)}")
        if self.targets is not None:
            raise DeltatuneError(f"AdapterFusion acts where its adapters do; leave targets={self.targets!r} out")
        if self.saved not in ("with adapters", "without adapters"):
            raise DeltatuneError(f"AdapterFusion: saved is 'with adapters' or 'without adapters', got {self.saved!r}")
        if self.methods and (len(self.methods) != len(self.adapters) or self.saved == "without adapters"):
            raise DeltatuneError("AdapterFusion: methods are one for each of adapters, which are saved then")
        if not 0 <= self.dropout < 1:
            raise DeltatuneError(f"AdapterFusion: dropout must lie in [0, 1), got {self.dropout}")

    def trained(self, model: nn.Module) -> list[Trained]:
        if self.methods:
            return [Trained(n, m) for n, m in zip(self.adapters, self.methods, strict=True)]
        return [Trained.find(model, n) for n in self.adapters]

    def select(self, model: nn.Module) -> Select:
        (name, paths), *others = [(t.name, set(t.paths(model))) for t in self.trained(model)]
        for other, theirs in others:
            if alone := sorted(paths ^ theirs):
                raise DeltatuneError(f"AdapterFusion: only one of {name!r} and {other!r} is at {alone[0]!r}")
        return lambda path, module: path in paths

    def shared(self, sites: Sequence[Site]) -> Units:
        return Units(self.trained(sites[0].model), sites)

    def build(self, site: Site, shared: Any) -> Fusion:
        return Fusion(site, shared, self, self.dropout, saved=self.saved == "with adapters")

    def callbacks(self) -> Iterable[Callback]:
        return [FusionRegularisation(weight=self.regularisation)]

    def portable(self, units: Sequence[Intervention]) -> Method:
        mine = [u.methods for u in units if isinstance(u, Fusion) and u.fusion == self]
        return replace(self, methods=mine[0]) if mine and self.saved == "with adapters" else self

    @staticmethod
    @contextmanager
    def attention(adapter: Adapter) -> Iterator[dict[str, list[Tensor]]]:
        """Inside, each forward pass appends its weights a (..., N), those of padding too, by the path of the module."""
        routers = {p: m.attention for p, _, u, _ in adapter.sites() for m in u.modules() if isinstance(m, Fusion)}
        if not routers:
            raise DeltatuneError(f"AdapterFusion: adapter {adapter.name!r} is a {type(adapter.method).__name__}")
        for router in routers.values():
            router.seen = []
        try:
            yield {path: router.seen for path, router in routers.items()}  # type: ignore[misc]
        finally:
            for router in routers.values():
                router.seen = None

    @staticmethod
    def prune(adapter: Adapter, k: int, seen: Mapping[str, Sequence[Tensor]], name: str) -> Adapter:
        """Attach a fusion of the k adapters with the most weight in `seen`, the mean over sites, called `name`."""
        means = torch.stack([torch.cat([a.flatten(0, -2) for a in s]).double().mean(0) for s in seen.values()])
        if not 1 <= k <= (n := means.shape[-1]):
            raise DeltatuneError(f"AdapterFusion: of {n} adapters 1 to {n} can be kept, not {k}")
        kept, state = sorted(means.mean(0).topk(k).indices.tolist()), adapter.state_dict()
        inside = ((p, at) for p, unit in adapter.units() for at, m in unit.named_modules() if isinstance(m, Fusion))
        for path in [f"{p}.{at}".rstrip(".") for p, at in inside]:
            for key in [k for k in state if k.startswith(f"{path}.adapters.")]:
                t, (i, rest) = state.pop(key), key.removeprefix(f"{path}.adapters.").split(".", 1)
                if int(i) in kept:
                    state[f"{path}.adapters.{kept.index(int(i))}.{rest}"] = t
        method = _pruned(adapter.method.portable([unit for _, unit in adapter.units()]), kept)
        cut = attach(adapter.model, method, name, dtype=adapter.dtype)
        cut.load_state_dict(state)
        return cut


def _pruned(method: Method, kept: Sequence[int]) -> Method:
    if isinstance(method, Union):
        return replace(method, methods=tuple(_pruned(m, kept) for m in method.methods))
    if isinstance(inner := getattr(method, "inner", None), Method):
        return replace(method, inner=_pruned(inner, kept))  # type: ignore[call-arg]
    if not isinstance(method, AdapterFusion):
        return method
    return replace(method, adapters=tuple(method.adapters[i] for i in kept),
                   methods=tuple(method.methods[i] for i in kept if method.methods))  # fmt: skip
