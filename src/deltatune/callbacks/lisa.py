"""LISA: Layerwise Importance Sampling for Memory-Efficient LLM Fine-Tuning. Pan et al., NeurIPS 2024. arXiv:2403.17919

Every `every` steps, freeze all blocks but `layers` of them drawn at random; what lies outside the blocks, embeddings,
final norm and head, trains all the time (alg. 1). The base itself is trained: there is no adapter.

A block that is frozen gives back its gradients and its optimizer state, which starts anew when it is drawn again; that
is what saves memory. Period p's draw depends on `seed` and p alone, so ranks agree, and a resumed run goes on with it.
Make the optimizer over all parameters: those of a block that is frozen when it is made would otherwise never train.

Beside the base and activations, training holds a gradient and two moments for each weight that trains:

    LISA    3 (E + gamma K) numbers    E weights outside the blocks, K in a block, gamma = `layers`
    LoRA    4 r S                      its own weights too; S the sum of in + out over its sites

So LISA holds less than LoRA only above some rank, which is high where the embeddings are much of the model. Llama-2-7B
in bf16: 17.5 GB with gamma = 2; LoRA in fp32, 18.6 GB for r = 128 and 13.8 GB for r = 8; they meet at r = 100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Part, Run, Select, resolve


@dataclass(frozen=True, kw_only=True)
class LISA(Callback):
    layers: int = 2
    every: int = 20
    seed: int = 0
    blocks: Select = Part("block")

    def start(self, run: Run) -> _Draws:
        if run.adapter is not None:
            raise DeltatuneError(f"LISA trains the base itself; detach adapter {run.adapter.name!r}, or leave LISA out")
        blocks = [m.module for m in resolve(run.model, self.blocks)]
        if not 1 <= self.layers <= len(blocks) or self.every < 1:
            raise DeltatuneError(
                f"LISA: layers={self.layers}, every={self.every}: the model has {len(blocks)} blocks;"
                f" give 1 <= layers <= {len(blocks)} and every >= 1"
            )
        return _Draws(self, run, blocks)


class _Draws(Events):
    def __init__(self, options: LISA, run: Run, blocks: list[nn.Module]) -> None:
        self.options, self.run, self.period = options, run, 0
        owners: dict[nn.Parameter, set[int]] = {}
        for i, block in enumerate(blocks):
            for p in block.parameters():
                owners.setdefault(p, set()).add(i)
        inside = {m for block in blocks for m in block.modules()}
        always = {p for m in run.model.modules() if m not in inside for p in m.parameters(recurse=False)}
        self.owners = {p: of for p, of in owners.items() if p.requires_grad and p not in always}
        self.n = len(blocks)

    def drawn(self, period: int) -> set[int]:
        """The blocks that train in a period."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + period)
        return set(torch.randperm(self.n, generator=generator)[: self.options.layers].tolist())

    def _enter(self, period: int) -> None:
        self.period, chosen = period, self.drawn(period)
        for p, of in self.owners.items():
            p.requires_grad_(not of.isdisjoint(chosen))
            if not p.requires_grad:
                p.grad = None
                if self.run.optimizer is not None:
                    self.run.optimizer.state.pop(p, None)

    def on_train_start(self, run: Run) -> None:
        self._enter(max(self.period, run.step // self.options.every))

    def on_step_end(self, run: Run) -> None:
        if run.step % self.options.every == 0:
            self._enter(run.step // self.options.every)

    def on_train_end(self, run: Run) -> None:
        for p in self.owners:
            p.requires_grad_(True)

    def state_dict(self) -> dict[str, Tensor]:
        return {"period": torch.tensor(self.period)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._enter(int(state["period"]))
