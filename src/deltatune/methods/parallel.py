"""Parallel adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He et al., 2022. arXiv:2110.04366

    y = f(.) + s (W_up relu(W_down x + b_down) + b_up)        f the feed-forward sublayer     (tab. 1, fig. 3)

W_up and biases start at zero, W_down Kaiming-uniform. x is the sublayer's input in the paper's text; its code reads the
residual stream, which where norms precede the sublayers (Llama but not BERT) is before the norm. `input=None` is the
code; `input=Part("mlp")`, or `Part("up")` where there is no such module, is the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention, Layers, Method, Part, Select, Site, resolve
from deltatune.models.activations import ACTIVATIONS, check_activation
from deltatune.models.anatomy import parts


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Method):
    """`targets`: what is added to; `input`: the modules whose input is read, before each; `activation`: by name."""

    lr: ClassVar[float] = 2e-4
    size: int = 512
    scale: float | Literal["learned"] = 4.0
    activation: str = "relu"
    input: Select = None

    usual = ("down",)
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or (isinstance(self.scale, str) and self.scale != "learned"):
            raise DeltatuneError(f"ParallelAdapter: size={self.size} is < 1, or scale={self.scale!r} not 'learned'")
        check_activation(self)

    def select(self, model: nn.Module) -> Select:
        outputs = Part(*self.usual) if self.targets is None else self.targets
        if self.input is not None:
            return outputs, self.input
        stream = _stream(model, [m.path for m in resolve(model, outputs)])
        return outputs, lambda path, module: path in stream

    def shared(self, sites: Sequence[Site]) -> Held:
        return Held({m.path for m in resolve(sites[0].model, self.targets, self.usual)})

    def build(self, site: Site, shared: Any) -> Intervention:
        return Bottleneck(site, self, shared) if site.path in shared.outputs else Tap(shared)


def _stream(model: nn.Module, outputs: Sequence[str]) -> set[str]:
    """In pre-norm models the norms of the blocks, the last to run being the MLP's; else its first projections."""
    try:
        if "post_norm" in parts(model):
            ends = {m.path for m in resolve(model, Part("down", "post_norm"))}
            if other := [path for path in outputs if path not in ends]:
                raise DeltatuneError(f"{other[0]!r} is no output of an MLP, before which this model's stream is read")
            return {m.path for m in resolve(model, None, ("gate", "up"))}
        inside = tuple(f"{m.path}." for m in resolve(model, Part("attention")))  # norms of queries and keys
        return {m.path for m in resolve(model, Layers(targets=Part("norm"))) if not m.path.startswith(inside)}
    except DeltatuneError as e:
        raise DeltatuneError(f"ParallelAdapter: {e}; name the modules whose input it reads: input=…") from e


class Held(nn.Module):
    """The x of the block that is running, one a thread, between the module that reads it and the one that adds."""

    def __init__(self, outputs: set[str]) -> None:
        super().__init__()
        self.outputs, self.x = outputs, dict[int, Tensor]()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"x": {}}

    def thread(self) -> int:
        return 0 if torch.compiler.is_compiling() else get_ident()


class Tap(Intervention):
    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held

    def forward(self, call: Base, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.held.x[self.held.thread()] = x
        return call(x, *args, **kwargs)


class Bottleneck(Intervention):
    """`down` (m, d), `up` (d, m) and their biases; `s` where it is learned."""

    roles = {"down": "down", "up": "up", "s": "scale"}

    def __init__(self, site: Site, method: ParallelAdapter, held: Held) -> None:
        super().__init__()
        self.held, self.activation, m, d = held, ACTIVATIONS[method.activation], method.size, site.shape.out
        self.s: Any = nn.Parameter(torch.ones((), **site.like)) if method.scale == "learned" else method.scale
        self.down = nn.Parameter(torch.empty(m, d, **site.like))
        self.up = nn.Parameter(torch.zeros(d, m, **site.like))
        self.down_bias, self.up_bias = (nn.Parameter(torch.zeros(n, **site.like)) for n in (m, d))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Tensor:
        y = call(*args, **kwargs)
        if (x := self.held.x.pop(self.held.thread(), None)) is None:
            raise DeltatuneError("ParallelAdapter: no module of `input` ran before this one; name one in each block")
        h = self.activation(F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return y + (self.s * F.linear(h, self.up, self.up_bias)).to(y.dtype)
