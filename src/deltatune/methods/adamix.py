"""AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning. Wang et al., EMNLP 2022. arXiv:2205.12410

    u' = u + W_up_i gelu(W_down_j u + b_down_j) + b_up_i      after the feed-forward sublayer            (sec. 3.1)
    W' = W + s B_i A_j                                        with `expert=LoRA()`, at q and v

Each of the n copies of a projection begins as the same one. In training every site draws i and j uniformly, each by
itself, in every forward pass, for the whole batch; otherwise it uses the mean of the copies, weights and biases
(sec. 3.3), so that `collapse` makes the expert's own kind of adapter of it. By default there is one up projection for
all. The loss compares two passes: see `callbacks.consistency`. The draws are torch's, which recomputed activations and
resumed runs repeat. Gradients of what is not drawn are zero: momentum and weight decay act there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import nn

from deltatune.callbacks.consistency import Consistency
from deltatune.core import Adapter, Callback, DeltatuneError, Method, Part, Site, Union, attach
from deltatune.methods.copies import Bottlenecks, Copies, LowRanks
from deltatune.methods.houlsby import Houlsby
from deltatune.methods.lora import LoRA, LowRank


@dataclass(frozen=True, kw_only=True)
class AdaMix(Method):
    """`n`: copies of each projection of `expert` but the one in `sharing`. `consistency`: the weight of that loss, 100
    in the authors' generation, 0 for one pass and none. `targets` are the modules, whatever the expert's."""

    lr: ClassVar[float] = 5e-3
    expert: Method = field(default_factory=lambda: Houlsby(size=16, norms=None))
    n: int = 4
    sharing: Literal["up", "down", "none"] = "up"
    consistency: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self.expert)
        if kind not in (Houlsby, LoRA):
            raise DeltatuneError(f"AdaMix: expert is a Houlsby or a LoRA, got {kind.__name__}")
        if getattr(self.expert, "norms", None) is not None:
            raise DeltatuneError("AdaMix: norms are not mixed; give the expert norms=None, and train them beside it")
        if kind is LoRA and self.expert.init is not None:  # type: ignore[attr-defined]
            raise DeltatuneError("AdaMix: copies of a LoRA start at B = 0; give the expert no init")
        if self.n < 1:
            raise DeltatuneError(f"AdaMix: n must be at least 1, got {self.n}")
        if self.sharing not in ("up", "down", "none"):
            raise DeltatuneError(f"AdaMix: sharing is 'up', 'down' or 'none', got {self.sharing!r}")
        self._loss()

    @property
    def usual(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("q", "v") if isinstance(self.expert, LoRA) else ("down",)

    @property
    def at(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.expert.at

    def build(self, site: Site, shared: nn.Module | None) -> Copies:
        unit = self.expert.build(site, shared)
        kind = LowRanks if isinstance(unit, LowRank) else Bottlenecks
        return kind(unit, self.n, self.sharing)  # type: ignore[arg-type]

    def callbacks(self) -> Iterable[Callback]:
        return [self._loss()] if self.consistency else []

    def _loss(self) -> Consistency:
        return Consistency(weight=self.consistency)

    @staticmethod
    def collapse(adapter: Adapter, name: str) -> Adapter:
        """Attach the means of the copies as an ordinary `Houlsby` or `LoRA` called `name`, and activate it."""
        if (method := _collapsed(adapter.method)) == adapter.method:
            raise DeltatuneError(f"AdaMix: adapter {adapter.name!r} is a {type(method).__name__}, without copies")
        state = adapter.state_dict()
        for path, unit in adapter.units():
            for inner, module in unit.named_modules(prefix=path):
                if isinstance(module, Copies):
                    for n, t in module.mean().items():
                        del state[f"{inner}.{n}"]
                        state[f"{inner}.{module.names[n]}"] = t
        one = attach(adapter.model, method, name, dtype=adapter.dtype)
        one.load_state_dict(state)
        return one


def _collapsed(method: Method) -> Method:
    if isinstance(method, Union):
        return replace(method, methods=tuple(map(_collapsed, method.methods)))
    if not isinstance(method, AdaMix):
        return method
    return replace(method.expert, targets=Part(*method.usual) if method.targets is None else method.targets)
