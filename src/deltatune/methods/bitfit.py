"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models. Ben Zaken et al., ACL
2022. arXiv:2106.10199

    b' = v,   v starting at b, for every bias vector of the model                          (sec. 3)

Linear layers' and norms' biases alike. Matrices that are called a bias (T5's relative positions) are none. A model
without bias vectors (Llama, T5) has nothing to train, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.core import Select
from deltatune.methods.tune import Tune


@dataclass(frozen=True, kw_only=True)
class BitFit(Tune):
    targets: Select = "all-layers"

    at: ClassVar[tuple[str, ...]] = ("bias",)
