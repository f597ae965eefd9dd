"""How a module stores a parameter and computes with it: the only place that knows layer types.

Two boundary details end here, so that no method ever sees them:
  * orientation: a weight is (out, in); a kernel is flattened to (out, in x kernel), an embedding is (tokens, dim);
  * storage:     a quantised weight is dequantised on read and requantised on write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.kernels import lowrank, lowrank_rows

Read = Callable[[nn.Module, str], Tensor]
Write = Callable[[nn.Module, str, Tensor], None]
Product = tuple[Tensor, Tensor, float, float]  # up, down, scale, dropout


class Kind:
    """How one type of layer computes when some of its parameters are replaced."""

    def run(self, module: Any, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's forward with `params` in place of its own; the module is not touched, threads may share it."""
        twin = object.__new__(type(module))
        twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters}}
        for name, p in params.items():
            twin._parameters[name] = p.reshape(module._parameters[name].shape)
        return plain_class(type(module)).forward(twin, *args, **kwargs)

    def low_rank(self, module: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
        """What `up @ down` added to the weight adds to the output; None where only the dense product will do."""
        return None

    def fused(self, module: Any, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float,
              magnitude: Tensor | None) -> Tensor | None:  # fmt: skip
        """The module's forward under W + scale up @ down, which sees x through dropout; None if it has none.

        magnitude (out,): what the output, but for the bias, is multiplied with."""
        return None

    def fused_rows(self, module: Any, x: Tensor, rows: Tensor, products: Sequence[Product]) -> Tensor | None:
        """The same, row i of the batch under `products[rows[i]]`, or under W itself where that is -1."""
        return None


class LinearKind(Kind):
    def run(self, module: Any, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        w = params["weight"] if "weight" in params else read(module, "weight")
        bias = params.get("bias", module.bias)
        return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def low_rank(self, module: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
        return F.linear(F.linear(x, down), up)

    def fused(self, module: Any, x: Tensor, up: Tensor, down: Tensor, scale: float, dropout: float,
              magnitude: Tensor | None) -> Tensor | None:  # fmt: skip
        if plain_class(type(module)) not in _LAYERS:  # a subclass may have its own forward
            return None
        w = self.frozen(module)
        return lowrank.linear(x, w, module.bias, down, up, scale, dropout, magnitude=magnitude)

    def fused_rows(self, module: Any, x: Tensor, rows: Tensor, products: Sequence[Product]) -> Tensor | None:
        if plain_class(type(module)) not in _LAYERS:
            return None
        parts = [lowrank_rows.Part(*product) for product in products]
        return lowrank_rows.linear(x, self.frozen(module), module.bias, rows, parts)

    def frozen(self, module: Any) -> Tensor | lowrank.Quantised:
        return read(module, "weight")


class QuantisedLinearKind(LinearKind):
    """Its own kernel wherever the weight is its own; the dense weight only where a delta replaces it."""

    def run(self, module: Any, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if "weight" in params or "bias" not in params:
            return super().run(module, params, *args, **kwargs)
        twin = object.__new__(type(module))
        twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, "bias": None}}
        y = plain_class(type(module)).forward(twin, *args, **kwargs)
        return y + params["bias"].to(y.dtype)

    def frozen(self, module: Any) -> Tensor | lowrank.Quantised:
        forward = partial(plain_class(type(module)).forward, module)
        return lowrank.Quantised(forward, partial(read, module, "weight"))


class EmbeddingKind(Kind):
    def run(self, module: Any, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if type(module) is not nn.Embedding and plain_class(type(module)).forward is not nn.Embedding.forward:
            return super().run(module, params, *args, **kwargs)  # one that scales or offsets, e.g. Gemma's, OPT's
        (x,), m = args, module
        scaling = m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse
        return F.embedding(x, params["weight"], *scaling)

    def low_rank(self, module: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
        if plain_class(type(module)).forward is not nn.Embedding.forward:
            return None
        return F.linear(F.embedding(x, up), down.T)


class ConvKind(Kind):
    def run(self, module: Any, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        w = params.get("weight", module.weight).reshape(module.weight.shape)
        return module._conv_forward(*args, w.to(args[0].dtype), params.get("bias", module.bias))

    def low_rank(self, module: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
        if module.groups != 1:
            return None
        h = module._conv_forward(x, down.reshape(len(down), *module.weight.shape[1:]), None)
        return torch.einsum("or,br...->bo...", up, h)


class LayerNormKind(Kind):
    def run(self, module: Any, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        w, b = params.get("weight", module.weight), params.get("bias", module.bias)
        (x,) = args
        return F.layer_norm(x, module.normalized_shape, w, b, module.eps)


LINEAR, QUANTISED = LinearKind(), QuantisedLinearKind()


@dataclass
class Layer:
    kind: Kind
    transposed: bool = False  # stores (in, out), as GPT-2's Conv1D does
    read: Read | None = None
    write: Write | None = None
    settle: Callable[[nn.Module], None] | None = None


_LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(LINEAR),
    nn.Embedding: Layer(EmbeddingKind()),
    nn.LayerNorm: Layer(LayerNormKind()),
    **{c: Layer(ConvKind()) for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
}
_OTHER = Layer(Kind())
_FOUND: dict[type[nn.Module], Layer] = {}  # by the class of a module, grafted or not
_TENSORS: dict[type, tuple[Read, Write | None]] = {}


def register(cls: type[nn.Module], kind: Kind = LINEAR, *, transposed: bool = False, read: Read | None = None,
             write: Write | None = None, settle: Callable[[nn.Module], None] | None = None) -> None:  # fmt: skip
    """Make a layer type known: how it computes, and for a quantised one how its weight is read and written.

    `write` puts a new parameter in place of the old one, which, put back, is the old weight bit for bit.
    `settle` is called when a model gets its first adapter, for layers that must be made ready to train."""
    _LAYERS[cls] = Layer(kind, transposed, read, write, settle)
    _FOUND.clear()


def register_tensor(cls: type[Tensor], read: Read, write: Write | None = None) -> None:
    """Make a type of quantised weight known, which ordinary layers hold; no `write` if it cannot be made anew."""
    _TENSORS[cls] = read, write


def layer_of(module: nn.Module) -> Layer:
    if (layer := _FOUND.get(type(module))) is None:
        layer = _FOUND[type(module)] = next((_LAYERS[c] for c in type(module).__mro__ if c in _LAYERS), _OTHER)
    held: type = type(module._parameters.get("weight"))
    if held is not nn.Parameter and (found := next((_TENSORS[c] for c in held.__mro__ if c in _TENSORS), None)):
        return Layer(QUANTISED if isinstance(layer.kind, LinearKind) else layer.kind, False, *found)
    return layer


def plain_class(cls: type[Any]) -> Any:
    """The class a grafted module had before."""
    return getattr(cls, "plain_class", cls)


def is_layer(module: nn.Module) -> bool:
    return layer_of(module) is not _OTHER


def is_linear(module: nn.Module) -> bool:
    return isinstance(layer_of(module).kind, LinearKind)


def is_quantised(module: nn.Module) -> bool:
    return layer_of(module).read is not None


def settle(module: nn.Module) -> None:
    if (ready := layer_of(module).settle) is not None:
        ready(module)


def was_transposed(module: nn.Module) -> bool:
    """Whether a quantised layer took the place of one that stores (in, out): transformers keeps that class."""
    cls = getattr(module, "source_cls", type(module))
    return any(_LAYERS[c].transposed for c in cls.__mro__ if c in _LAYERS)


def is_writable(module: nn.Module, param: str) -> bool:
    layer = layer_of(module)
    return param != "weight" or layer.read is None or layer.write is not None


def read(module: nn.Module, param: str) -> Tensor:
    """The parameter as methods see it: (out, in), flattened and dequantised."""
    layer = layer_of(module)
    if param == "weight" and layer.read:
        return layer.read(module, param)
    w = getattr(module, param)
    if layer.transposed and w.ndim == 2:
        return w.T
    return w.flatten(1) if w.ndim > 2 else w


def shape(module: nn.Module, param: str) -> torch.Size:
    """That of `read`, without dequantising."""
    if param == "weight" and is_quantised(module) and is_linear(module):
        return torch.Size((module.out_features, module.in_features))  # type: ignore[arg-type]
    return read(module, param).shape


@torch.no_grad()
def write(module: nn.Module, param: str, w: Tensor) -> None:
    """Store `w`, as `read` gave it, in the module's own layout, type and precision."""
    layer = layer_of(module)
    if param == "weight" and layer.write:
        return layer.write(module, param, w)
    p = getattr(module, param)
    p.copy_((w.T if layer.transposed and w.ndim == 2 else w).reshape(p.shape).to(p.dtype))
