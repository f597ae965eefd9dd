"""What an adapter has learned and trains no more, kept beside its factors, so that the base is never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltatune.core.errors import DeltatuneError
from deltatune.core.units import Base, Delta


class Constant(Delta):
    """W' = W + up @ down, buffers `up` (out, n), `down` (n, in). It acts as a part of W would: without dropout."""

    up: Tensor
    down: Tensor

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.register_buffer("up", up.detach().clone())
        self.register_buffer("down", down.detach().clone())

    @torch.no_grad()
    def fold(self) -> None:
        """Where n exceeds min(out, in), the dense product and an identity say the same, and are the largest it gets."""
        out, in_ = len(self.up), self.down.shape[1]
        if len(self.down) > min(out, in_):
            whole = self.up @ self.down
            one = torch.eye(min(out, in_), dtype=whole.dtype, device=whole.device)
            self.up, self.down = (whole, one) if in_ <= out else (one, whole)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def weight(self, w: Tensor) -> Tensor:
        return w + self.up @ self.down

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = call.plus(x, self.up, self.down)
        return super().forward(call, x, *args, **kwargs) if y is None else y


class Staged(Delta):
    """A low-rank delta that may train in stages: W' = W + constant + product, what earlier stages left and what is in
    training. The constant's rank n grows with what is kept; there is none until something is."""

    grows = ("constant.up", "constant.down")

    def __init__(self) -> None:
        super().__init__()
        self.constant: Constant | None = None

    def product(self) -> tuple[Tensor, Tensor]:
        """(up, down) of what is in training."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        up, down = self.product()
        if self.constant is None:
            return up, down
        return torch.cat([up, self.constant.up], 1), torch.cat([down, self.constant.down])

    def weight(self, w: Tensor) -> Tensor:
        up, down = self.product()
        return (w if self.constant is None else self.constant.weight(w)) + up @ down

    def outer(self, call: Base) -> Base:
        """The base with what earlier stages left."""
        return call if self.constant is None else call.then(self.constant, "weight")

    @torch.no_grad()
    def keep(self, up: Tensor, down: Tensor) -> None:
        """Add a product to the constant. Exact: the factors stand side by side, and n is the sum of their ranks."""
        if self.constant is not None:
            up, down = torch.cat([self.constant.up, up], 1), torch.cat([self.constant.down, down])
        self.constant = Constant(up, down)

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        self.constant = None
        if shapes:
            up, down = self.product()
            new = Constant(*(up.new_empty(shapes.get(n, (0, 0))) for n in self.grows))
            if (len(new.up), new.up.shape[1], new.down.shape[1]) != (len(up), len(new.down), down.shape[1]):
                raise DeltatuneError(f"tensors of shapes {[*map(tuple, shapes.values())]} do not fit the weight")
            self.constant = new
