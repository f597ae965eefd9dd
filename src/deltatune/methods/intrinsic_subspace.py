"""Exploring Universal Intrinsic Task Subspace via Prompt Tuning. Qin et al., 2021. arXiv:2110.07867

    z = W_1 P_t + b_1,   P'_t = W_3 tanh(W_2 z + b_2) + b_3,     P_t in R^{p d} flattened,  z in R^{d_I}
    min  L(P'_t) + alpha mean((P'_t - P_t)^2)

Multi-task subspace finding, the first of two stages: prompts P_t that were tuned on source tasks stay as they are, and
W and b are learned on those tasks together, with P'_t as the prompt of task t; `IntrinsicPrompt` is the second stage.
Rows name their tasks, as `adapter="subspace.squad"` in an example. The second term is over all source prompts in every
step. The authors smooth the labels of the first by 0.1; here it is the loss of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.callbacks.reconstruction import Reconstruction
from deltatune.callbacks.source_prompts import give, tuned
from deltatune.core import Adapter, Callback, DeltatuneError, Method, Site, attach, detach
from deltatune.methods.intrinsic_prompt import IntrinsicPrompt, decoder
from deltatune.models.prompting import Prompt
from deltatune.models.task_prompts import Made, check_tasks, task_prompt


@dataclass(frozen=True, kw_only=True)
class IntrinsicSubspace(IntrinsicPrompt):
    """`alpha`; `tasks`: the names of the sources, whose prompts `autoencoder` or the callback `SourcePrompts` gives."""

    lr: ClassVar[float] = 1e-3
    alpha: float = 200.0
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tasks(self, self.tasks)
        if self.alpha < 0:
            raise DeltatuneError(f"IntrinsicSubspace: alpha must not be negative, got {self.alpha}")

    def flat(self) -> Method:
        if len(self.tasks) > 1:
            raise DeltatuneError(f"IntrinsicSubspace: {len(self.tasks)} tasks have no one prompt to flatten to")
        return super().flat()

    def callbacks(self) -> Iterable[Callback]:
        return [Reconstruction(alpha=self.alpha)]

    def made(self, unit: Prompt, start: Tensor, site: Site) -> Prompt:
        prompts = start.repeat(max(1, len(self.tasks)), 1, 1)
        return task_prompt(unit.at, self.tasks, Autoencoder(prompts, self, site))


class Autoencoder(Made):
    """`prompts` P (tasks, p, d), which are not trained, `encoder` and `decoder`; `given`: whether they were tuned."""

    prompts: Tensor
    given: Tensor

    def __init__(self, prompts: Tensor, method: IntrinsicPrompt, site: Site) -> None:
        super().__init__()
        self.register_buffer("prompts", prompts)
        self.register_buffer("given", torch.tensor(False, device=prompts.device))
        self.encoder = nn.Linear(prompts[0].numel(), method.dim, **site.like)
        self.decoder = decoder(method, prompts[0].numel(), site)

    def made(self, i: int) -> Tensor:
        return self.decoder(self.encoder(self.prompts[i].flatten())).view(self.prompts[i].shape)  # type: ignore[no-any-return]

    def error(self) -> Tensor:
        """mean((P' - P)^2) of all."""
        flat = self.prompts.flatten(1)
        return F.mse_loss(self.decoder(self.encoder(flat)), flat)


def autoencoder(model: nn.Module, prompts: Mapping[str, Tensor | Adapter | str | Path], name: str = "subspace",
                **options: Any) -> Adapter:  # fmt: skip
    """Attach an `IntrinsicSubspace` of the tuned `prompts` of the source tasks: tensors (p, d), adapters, or folders.

    What is trained of it, the decoder included, is found by `transfer`. options: those of `IntrinsicSubspace`."""
    tensors = {task: tuned(model, task, source) for task, source in prompts.items()}
    shapes = {tuple(t.shape) for t in tensors.values()}
    if len(shapes) != 1:
        raise DeltatuneError(f"autoencoder: prompts have the shapes {sorted(shapes)}; give several, of one length")
    adapter = attach(model, IntrinsicSubspace(length=next(iter(shapes))[0], tasks=tuple(tensors), **options), name)
    try:
        give(adapter, tensors)
    except DeltatuneError:
        detach(model, name)
        raise
    return adapter
