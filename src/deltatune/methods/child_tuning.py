"""Child-Tuning-D: Raise a Child in Large Language Model. Xu et al., EMNLP 2021. arXiv:2109.05687

    F_i = (1/|D|) sum_j (d log p(y_j | x_j) / d w_i)^2
    w' = w + M * D,     M marks the child network: the share p_D of the parameters with the largest F_i

The task-driven form: the child network is chosen once, before training. It is FISH Mask with a far larger share, and a
masked difference here, so that what is not in the child network stays put under weight decay too; the authors let it
decay, and train embeddings and head whole (add `Tune`). The task-free form, Child-Tuning-F, is `ChildTuningF`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.fish_mask import FishMask


@dataclass(frozen=True, kw_only=True)
class ChildTuning(FishMask):
    """`density`: p_D; `samples`: how many of the training examples F is the mean over."""

    lr: ClassVar[float] = 5e-4
    density: float = 0.3
