"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al., EMNLP 2021. arXiv:2104.08691

    [P; E(x)],   P in R^{p x d},  E(x) in R^{s x d}                                        (sec. 2)

The input of the (encoder's) first block; nothing is put before a decoder's input if there is an encoder, and in models
that begin with [CLS] the prompt follows it. The output has the length of x, and a mask is the mask of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core import Base, DeltatuneError, Intervention, Site
from deltatune.models.calls import arguments
from deltatune.models.prompting import Layout, Positioned, Prompt, arrange, embeddings, layout, stack

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Positioned):
    """`length` p, and how P starts (sec. 3.2):

    "vocabulary"    embeddings of tokens drawn without replacement
    "uniform"       U(-1/2, 1/2)
    (5, 17, 4)      token ids of a text: its embeddings, repeated or cut to p
    ((5, 17), (4,)) token ids of class labels: row i is the mean embedding of label i, the rest as "vocabulary"
    """

    lr: ClassVar[float] = 3e-2
    length: int = 20
    init: Literal["vocabulary", "uniform"] | Ids | tuple[Ids, ...] = "vocabulary"

    usual = ("backbone", "decoder")
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init, tuple):
            object.__setattr__(self, "init", tuple(tuple(i) if isinstance(i, list) else i for i in self.init))
        if self.length < 1:
            raise DeltatuneError(f"{type(self).__name__}: the length must be at least 1, got {self.length}")
        if self.init not in ("vocabulary", "uniform") and (isinstance(self.init, str) or not self.init):
            raise DeltatuneError(
                f"{type(self).__name__}: init is 'vocabulary', 'uniform' or token ids, got {self.init!r}; tokenise a "
                "text first"
            )

    def shared(self, sites: Sequence[Site]) -> nn.Module | None:
        layout(sites[0])  # refuses, before anything is built, a backbone that takes no tokens
        return None

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        if site.path.rpartition(".")[2] == "decoder" and layout(site).whole:
            return CrossMask(self.length)
        return Prompt(layout(site), self.start(site))

    @torch.no_grad()
    def start(self, site: Site) -> Tensor:
        """P (p, d) before training."""
        table: Any = embeddings(site.module)
        p, (n, d) = self.length, (table.num_embeddings, table.embedding_dim)
        if site.device.type == "meta":
            return torch.empty(p, d, **site.like)
        if self.init == "uniform":
            return torch.rand(p, d, **site.like) - 0.5
        rows: list[Ids] = list(zip(torch.cat([torch.randperm(n) for _ in range(0, p, n)]).tolist()))  # noqa: B905
        if isinstance(self.init, tuple):
            given: list[Ids] = [i if isinstance(i, tuple) else (i,) for i in self.init]
            rows = given + rows if isinstance(self.init[0], tuple) else given * -(-p // len(given))
        if wrong := [i for row in rows for i in row if not 0 <= i < n]:
            raise DeltatuneError(
                f"{type(self).__name__}: init: token id {wrong[0]} is not among the {n} of the vocabulary"
            )
        means = [table(torch.tensor(r, device=table.weight.device)).mean(0) for r in rows[:p]]
        return torch.stack(means).to(**site.like)


class CrossMask(Intervention):
    """At a decoder: lets it see the `length` states that its encoder has of the prompt."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        a = arguments(call.module, args, kwargs)
        states, mask = a.get("encoder_hidden_states"), a.get("encoder_attention_mask")
        if states is not None and mask is not None:
            a["encoder_attention_mask"] = self.extended(mask, torch.ones(len(mask), self.length, device=mask.device))
        return call(**a)

    @staticmethod
    def extended(mask: Tensor, slots: Tensor) -> Tensor:
        return arrange(Layout(causal=False), slots.bool(), mask)[0]

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(call.module, args, kwargs)
        if (states := a.get("encoder_hidden_states")) is not None:
            _, slots = stack([torch.zeros(u.length, 1, device=rows.device) for u in units], rows)
            mask = a.get("encoder_attention_mask")
            mask = rows.new_ones(len(rows), states.shape[1] - slots.shape[1]) if mask is None else mask
            a["encoder_attention_mask"] = cls.extended(mask, slots)
        return call(**a)
