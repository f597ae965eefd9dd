"""LoRA-drop's choice of sites. Zhou et al., COLING 2025. arXiv:2402.07721

    g_l = mean over tokens of ||dW_l x||^2,    I_l = g_l / sum of g over the sites of l's kind

While B = 0 nothing is put out, so a trial comes first: every site is trained on a few batches, then measured on them.
Kind by kind, the sites of the largest I keep a pair of their own until their sum reaches `threshold`; the others share
one. All values then go back to where they were, and training begins. A resumed run makes the same choice again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deltatune.core import Callback, DeltatuneError, Events, Method, Run, Union


@dataclass(frozen=True, kw_only=True)
class OutputEvaluation(Callback):
    """`batches` of the training data, at the learning rate `lr`, from factors that `seed` draws."""

    threshold: float = 0.9
    batches: int = 64
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise DeltatuneError(f"LoRADrop: threshold must lie in (0, 1], got {self.threshold}")
        if self.batches < 1 or self.lr <= 0:
            raise DeltatuneError(f"LoRADrop: a trial of {self.batches} batches at the rate {self.lr} moves nothing")

    def start(self, run: Run) -> Events:
        """Chooses now: the optimizer is made of what is left."""
        adapter: Any = run.adapter
        parts = [] if adapter is None else [(i, p) for i, p in enumerate(adapter.method.parts()) if hasattr(p, "kept")]
        if not parts:
            raise DeltatuneError("LoRADrop: its sites can share only if it is attached by itself or in a Union")
        for i, part in parts:
            if part.kept is not None:  # the choice of an earlier run
                continue
            if run.losses is None:
                raise DeltatuneError(
                    "LoRADrop chooses its sites by training data, and this loop offers none (Run.losses is None); "
                    "train with deltatune.train.fit, or name the sites: kept=(…)"
                )
            pairs = [m for _, unit in adapter.units() for m in unit.modules() if getattr(m, "owner", None) == part]
            kept = self.choose([p.kind for p in pairs], self.outputs(run, pairs))
            for n, pair in enumerate(pairs):
                if n not in kept:
                    adapter.record.shared[str(i)].tie(pair)
            chosen = replace(part, kept=tuple(pairs[n].place for n in sorted(kept)))
            adapter.record.method = _put(adapter.method, part, chosen)
        return Events()

    def outputs(self, run: Run, pairs: Sequence[Any]) -> Tensor:
        """(sites,): g after the trial; the adapter is left as it was."""
        adapter: Any = run.adapter
        before = {name: t.detach().clone() for name, t in adapter.state_dict().items()}
        training, trained = run.model.training, [p for p in adapter.parameters() if p.requires_grad]
        assert run.losses is not None
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for pair in pairs:
                nn.init.kaiming_uniform_(pair.a, a=5**0.5)
            optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)
            for loss in run.losses(self.batches):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            meters = [_Meter(pair) for pair in pairs]
            with torch.no_grad():
                run.model.eval()
                for _ in run.losses(self.batches):
                    pass
            run.model.train(training)
        adapter.load_state_dict(before)
        g = torch.stack([meter.stop().to(pairs[0].a.device) for meter in meters])
        if dist.is_available() and dist.is_initialized():  # each process has measured its part of the data
            dist.all_reduce(g)
        return g.cpu()

    def choose(self, kinds: Sequence[str], g: Tensor) -> set[int]:
        """The sites that keep a pair of their own: of each kind, the fewest whose I sum to `threshold`."""
        members = defaultdict(list)
        for n, kind in enumerate(kinds):
            members[kind].append(n)
        kept: set[int] = set()
        for kind, sites in members.items():
            total, part = float(g[sites].double().sum()), 0.0
            if not total > 0:
                raise DeltatuneError(f"LoRADrop: the trial taught {kind!r} nothing (output {total}); raise trial_lr")
            for n in sorted(sites, key=lambda n: -float(g[n])):
                if self.threshold == 1 or part / total < self.threshold:
                    kept.add(n)
                part += float(g[n])
        return kept


class _Meter:
    """The mean of ||dW x||^2 over the tokens that reach a pair."""

    def __init__(self, pair: Any) -> None:
        self.sum, self.tokens = torch.zeros((), device=pair.a.device), 0
        self.handle = pair.register_forward_pre_hook(self.measure)

    def measure(self, pair: Any, args: tuple[Any, ...]) -> None:
        call, x = args[:2]
        up, down = pair.factors()
        update = call.low_rank(x.to(down.dtype) if x.is_floating_point() else x, up, down)
        if update is None:
            raise DeltatuneError(f"LoRADrop: {pair.place!r} has no low-rank output to measure; leave it out of targets")
        self.sum += update.float().square().sum()
        self.tokens += update.numel() // len(up)

    def stop(self) -> Tensor:
        self.handle.remove()
        return self.sum / max(1, self.tokens)


def _put(method: Method, old: Method, new: Method) -> Method:
    if isinstance(method, Union):
        return replace(method, methods=tuple(_put(part, old, new) for part in method.methods))
    return new if method == old else method
