"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks. Liu et al., 2022.
arXiv:2110.07602

    attention(Q, [P_k; K], [P_v; V]),   P_k, P_v in R^{p x D} of their own in every block  (deep prompts, sec. 3.2)
    logits = W c + b                    an ordinary head on [CLS] or on every token, trained with them

The deep prompts are prefix tuning's without its network; in training they are dropped out. Models with a language
model's head keep it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltatune.core import Method, Part, Select
from deltatune.methods.prefix import PrefixTuning
from deltatune.methods.tune import Tune
from deltatune.models.anatomy import ANATOMY, parts


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """`length` and learning rate are what to search: short prompts for simple tasks, long ones for tagging and reading
    (8 to 128 in the paper's recipes). `labels`: of the head's classes, as `Tune`'s; () for the base's."""

    lr: ClassVar[float] = 3e-2
    dropout: float = 0.1
    labels: tuple[str, ...] = ()

    def parts(self) -> Sequence[Method]:
        return *super().parts(), _Classifier(labels=self.labels)

    def classes(self) -> tuple[str, ...]:
        return self.labels


@dataclass(frozen=True, kw_only=True)
class _Classifier(Tune):
    """The head, of models that have one for a task."""

    def select(self, model: Any) -> Select:
        language = getattr(model, "get_output_embeddings", lambda: None)() is not None
        known = getattr(getattr(model, "config", None), "model_type", None) in ANATOMY
        return Part("head") if known and not language and "head" in parts(model) else ()
