"""What runs at a site. A method implements the weakest of these that can express it.

    Delta         W' = weight(W)               mergeable, hot-swappable, batchable
    Intervention  y  = forward(call, *args)    around the call of any module, the whole model included
    Router        y  = forward(x, branches)    combines several adapters at one site

`Base` is what a unit is given: the module, with the units inside it, seen as a function of one of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.errors import DeltatuneError
from deltatune.storage import layers

CALL, ATTENTION = "call", "attention"  # the places of a unit that replaces no parameter


class Intervention(nn.Module):
    """Code around a module's call. `call(*args, **kwargs)` runs whatever is inside."""

    roles: ClassVar[Mapping[str, str]] = {}  # parameter name -> role ("down", "up", "scale", "gate", ...)
    grows: ClassVar[tuple[str, ...]] = ()  # tensors that training may add, remove and resize
    undecayed: ClassVar[tuple[str, ...]] = ()  # tensors whose zero is not the base: weight decay leaves them alone
    lengthens: ClassVar[bool] = False  # whether rows get tokens from it; other rows' units at its module are inside it

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        """Make room for the tensors of `grows` with these names and shapes, and drop those not among them."""

    def of(self, task: str) -> Any:
        """This unit for rows of that task of its adapter: itself, unless it has a part for each."""
        return self

    def flatten(self) -> None:
        """Keep the tensors that a network makes, and drop the network."""

    def merged(self, module: nn.Module) -> Mapping[str, Any]:
        """What merging sets in `module`, beside its parameters, so that it does by itself what this does in inference:
        values by dotted attribute; {} for what acts in training alone. Raises DeltatuneError if nothing would do."""
        raise DeltatuneError(f"{type(self).__name__} acts on activations and cannot be merged")

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Row i of the batch under `units[rows[i]]` (-1: under none), in one call of the module.

        Needed only where rows cannot be run apart, because the call changes something they share, such as a cache.
        """
        return NotImplemented


class Delta(Intervention):
    """An effective weight. `weight` is the paper's equation; `forward` may restate it without forming W'."""

    def weight(self, w: Tensor) -> Tensor:
        """(out, in) -> (out, in), in the wider of the two precisions."""
        raise NotImplementedError

    def bias(self, b: Tensor) -> Tensor:
        """(out,) -> (out,), for the deltas that act on the whole output and so on the bias as well."""
        return b

    def merged(self, module: nn.Module) -> Mapping[str, Any]:
        return {}

    def forward(self, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        whole = call.under("bias", self.bias(call.bias)) if self.moves_bias and call.bias is not None else call
        return whole.op(self.weight(call.weight), x, *args, **kwargs)

    @property
    def moves_bias(self) -> bool:
        return type(self).bias is not Delta.bias

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) with W' = W + up @ down, when the delta is low rank: what batched kernels serve."""
        return None


class Router(nn.Module):
    """Combines the outputs of several branches at one site. `names`: the adapters, if the router itself names them."""

    names: tuple[str | None, ...] = ()

    def check(self, methods: Mapping[str, Any]) -> None:
        """Raises DeltatuneError if the adapters that the router names, of these methods, do not suit it."""

    def forward(self, x: Tensor, branches: Sequence[Callable[[], Tensor]]) -> Tensor:
        raise NotImplementedError

    def route(self, names: Sequence[str], units: Mapping[str, Sequence[Intervention]], bind: Callable[..., Base],
              args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # fmt: skip
        """One call of a module. `units`: those of the active adapters `names` that are here; `bind(*names)`: the base
        under adapters. By default every adapter is a branch, one that is not here being the base alone."""
        x = next(iter((*args, *kwargs.values())))
        return self(x, [partial(bind(n), *args, **kwargs) for n in names])


class Base:
    """A frozen module as a function of its parameter `at`; `held` parameters stand in for the module's own."""

    def __init__(self, module: nn.Module, call: Callable[..., Any], at: str = "weight",
                 held: Mapping[str, Tensor] | None = None) -> None:  # fmt: skip
        self.module, self.call, self.at, self.held = module, call, at, held or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.held:
            return layers.layer_of(self.module).kind.run(self.module, self.held, *args, **kwargs)
        return self.call(*args, **kwargs)

    def parameter(self, name: str) -> Tensor | None:
        """The parameter in effect here, (out, in) if it is a weight; None if the module has none."""
        if name in self.held:
            return self.held[name]
        return None if getattr(self.module, name, None) is None else layers.read(self.module, name)

    def under(self, name: str, value: Tensor) -> Base:
        """This base with `value` as its parameter `name`."""
        own = getattr(self.module, name)
        value = value if layers.is_quantised(self.module) or own is None else value.to(own.dtype)
        return Base(self.module, self.call, self.at, {**self.held, name: value})

    def view(self, at: str) -> Base:
        """The same function, seen as one of the parameter `at`."""
        return Base(self.module, self.call, at if at not in (CALL, ATTENTION) else "weight", self.held)

    def then(self, unit: Intervention, at: str) -> Base:
        """The base an outer unit sees once `unit` is in place: how adapters stack."""
        return Stacked(self, unit, at)

    @property
    def weight(self) -> Tensor:
        w = self.parameter(self.at)
        if w is None:
            raise DeltatuneError(f"{type(self.module).__name__} has no parameter {self.at!r}")
        return w

    @property
    def bias(self) -> Tensor | None:
        return self.parameter("bias")

    @property
    def is_linear(self) -> bool:
        """Whether `call(x) + F.linear(x, dW)` is the module under W + dW."""
        return self.at == "weight" and layers.is_linear(self.module)

    def op(self, w: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module as if its parameter were `w`."""
        return self.under(self.at, w)(*args, **kwargs)

    def low_rank(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
        """What adding `up @ down` to the weight adds to the output, without forming it; None if it must be formed."""
        return layers.layer_of(self.module).kind.low_rank(self.module, x, up, down) if self.at == "weight" else None

    def plus(self, x: Tensor, up: Tensor, down: Tensor, scale: float = 1.0, dropout: float = 0.0,
             magnitude: Tensor | None = None) -> Tensor | None:  # fmt: skip
        """The module under W + scale up @ down, the product unformed; None if it must be formed.

        dropout: the probability with which an element of x is hidden from `down`, 0 outside of training.
        magnitude (out,): what the output, but for the bias, is multiplied with; None then also if that is no part of
        the same product."""
        if self.at != "weight":
            return None
        if type(self) is Base and not self.held:
            kind = layers.layer_of(self.module).kind
            if (y := kind.fused(self.module, x, up, down, scale, dropout, magnitude)) is not None:
                return y
        if magnitude is not None:
            return None
        h = F.dropout(x.to(down.dtype), dropout) if x.is_floating_point() else x
        if (update := self.low_rank(h, up, down)) is None:
            return None
        y = self(x)
        return y + (scale * update).to(y.dtype)

    def plus_in_rows(self, x: Tensor, rows: Tensor, products: Sequence[layers.Product]) -> Tensor | None:
        """As `plus`, row i of the batch with the arguments `products[rows[i]]`, or the module itself where that is -1;
        None if the rows must be run apart."""
        if self.at != "weight" or type(self) is not Base or self.held or x.ndim < 2:
            return None
        return layers.layer_of(self.module).kind.fused_rows(self.module, x, rows, products)


class Stacked(Base):
    """A base inside one more unit."""

    def __init__(self, inner: Base, unit: Intervention, unit_at: str, at: str | None = None) -> None:
        super().__init__(inner.module, inner.call, at or inner.at)
        self.inner, self.unit, self.unit_at = inner, unit, unit_at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unit(self.inner.view(self.unit_at), *args, **kwargs)

    def parameter(self, name: str) -> Tensor | None:
        w = self.inner.parameter(name)
        if w is None or not isinstance(self.unit, Delta):
            return w
        if name == self.unit_at:
            return self.unit.weight(w)
        return self.unit.bias(w) if name == "bias" and self.unit_at == "weight" else w

    def under(self, name: str, value: Tensor) -> Base:
        inner = self.inner.under(name, value)
        moves = isinstance(self.unit, Delta) and self.unit.moves_bias and self.unit_at == "weight"
        other = {"weight": "bias", "bias": "weight"}.get(name) if moves else None
        if other is None and name != self.unit_at:
            return Stacked(inner, self.unit, self.unit_at, self.at)
        if other and (moved := self.parameter(other)) is not None:  # `value` is final; the unit's other effect stays
            inner = inner.under(other, moved)
        return inner.view(self.at)

    def view(self, at: str) -> Base:
        return Stacked(self.inner, self.unit, self.unit_at, at if at not in (CALL, ATTENTION) else "weight")


class _Rows(Base):
    """Some output rows of a linear base whose whole output `y` for `x` is already known."""

    def __init__(self, base: Base, rows: Tensor, x: Tensor | None, y: Tensor | None) -> None:
        super().__init__(base.module, base.call, base.at)
        self.base, self.rows, self.x, self.y = base, rows, x, y

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = self.y if self.y is not None and x is self.x else self.base(x)
        return y.index_select(-1, self.rows)

    def parameter(self, name: str) -> Tensor | None:
        p = self.base.parameter(name)
        return None if p is None else p.index_select(0, self.rows)

    def under(self, name: str, value: Tensor) -> Base:
        whole = self.base.parameter(name)
        assert whole is not None  # a unit only replaces what it was given
        return _Rows(
            self.base.under(name, whole.index_copy(0, self.rows, value.to(whole.dtype))), self.rows, None, None
        )  # type: ignore[arg-type]


class Sliced(Delta):
    """A delta of some rows of a fused projection: one third of `c_attn`, the keys of `query_key_value`."""

    rows: Tensor

    def __init__(self, inner: Delta, rows: Tensor, out: int) -> None:
        super().__init__()
        self.inner, self.out = inner, out
        self.register_buffer("rows", rows, persistent=False)

    def weight(self, w: Tensor) -> Tensor:
        part = self.inner.weight(w.index_select(0, self.rows))
        return w.to(part.dtype).index_copy(0, self.rows, part)

    def bias(self, b: Tensor) -> Tensor:
        part = self.inner.bias(b.index_select(0, self.rows))
        return b.to(part.dtype).index_copy(0, self.rows, part)

    @property
    def moves_bias(self) -> bool:
        return self.inner.moves_bias

    def forward(self, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(x)
        return y.index_copy(-1, self.rows, self.inner(_Rows(call, self.rows, x, y), x))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if (factors := self.inner.factors()) is None:
            return None
        up, down = factors
        return up.new_zeros(self.out, up.shape[1]).index_copy(0, self.rows, up), down
