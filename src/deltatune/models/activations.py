"""The activation functions that bottleneck adapters have, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deltatune.core.errors import DeltatuneError

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
}  # fmt: skip


def check_activation(method: Any) -> None:
    """Raises DeltatuneError unless `method.activation` is one of them."""
    if method.activation not in ACTIVATIONS:
        known, name = ", ".join(ACTIVATIONS), type(method).__name__
        raise DeltatuneError(f"{name}: activation={method.activation!r} is not one of {known}")
