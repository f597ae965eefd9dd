"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models. Ben Zaken et al., ACL
2022. arXiv:2106.10199

    b' = v,   v starting at b, for every bias vector of the model                          (sec. 3)

Linear layers' and norms' biases alike; `targets=Part("q", "up")` is the paper's smaller set, the biases of queries and
of the first feed-forward layers. Matrices that are called a bias (T5's relative positions) are none. A model without
bias vectors (Llama, T5) has nothing to train, and attaching says so: a bias added where there was none would be another
method, and could not be merged. The head of a task is trained whole, as in the paper, by `Tune`, and is not among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.core import Method, Select, Site
from deltatune.methods.tune import Copy


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    lr: ClassVar[float] = 5e-3
    targets: Select = "all-layers"

    at: ClassVar[tuple[str, ...]] = ("bias",)
    otherwise: ClassVar[str] = "; this model has none to train: IA3, or Tune on its norms, trains about as few numbers"

    def build(self, site: Site, shared: nn.Module | None) -> Copy:
        return Copy(site)
