"""The proof after the first step: what was asked to train does, and what was frozen did not change."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deltatune.core.callback import Run
from deltatune.core.errors import DeltatuneError

SAMPLE = 64  # elements of each frozen parameter that are compared
GRACE = 10  # steps in which every site must be seen, where callbacks may let sites rest


def checksums(model: nn.Module, trained: set[int]) -> dict[str, int]:
    """CRC of up to 64 elements, spread evenly, of every parameter whose id is not in `trained`; of codes, not of what
    they stand for."""
    sums: dict[str, int] = {}
    for name, p in model.named_parameters():
        for t in _stored(p) if id(p) not in trained else ():
            few = t.reshape(-1)[:: max(1, t.numel() // SAMPLE)][:SAMPLE].contiguous().cpu()
            sums[name] = zlib.crc32(few.view(torch.uint8).numpy().tobytes(), sums.get(name, 0))
    return sums


def _stored(p: nn.Parameter) -> list[Tensor]:
    """The plain tensors that hold a parameter; none that are spread over processes, or have no values."""
    if p.is_meta or isinstance(p, DTensor):
        return []
    t: Any = p.detach()
    inner = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ()
    return [getattr(t, name) for name in inner] or [t.as_subclass(Tensor)]


def digest(sums: dict[str, int]) -> str:
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


class Proof:
    """Follows the first steps of a run until every site has been seen to train.

    A parameter may have a gradient of zero at first, as LoRA's A while B = 0, or none, as an expert without tokens;
    a site may not, unless `rests`, when callbacks can leave sites out of a step: those have until step 10."""

    def __init__(self, run: Run, base: dict[str, int], rests: bool) -> None:
        self.base, self.last = base, min(GRACE, run.steps) if rests else 1
        self.sites = _sites(run)
        self.reached: set[int] = set()
        self.felt: set[int] = set()
        self.before: list[tuple[str, nn.Parameter, Tensor]] = []

    def after_backward(self, run: Run) -> None:
        """Once the gradients of the step are complete."""
        self.before = []
        for name, p in _requested(run):
            if p.grad is None:
                continue
            self.reached.add(id(p))
            if bool(p.grad.count_nonzero()):
                self.felt.add(id(p))
                if run.adapter is not None or not self.before:  # a copy of the whole base would not fit
                    self.before.append((name, p, p.detach().clone()))

    def after_step(self, run: Run, trained: int) -> str | None:
        """After the optimizer's step; the finding once it is complete. Raises DeltatuneError with reason and remedy."""
        stuck = [(name, p) for name, p, old in self.before if torch.equal(p.detach(), old)]
        if stuck:
            name, p = stuck[0]
            raise _failed(
                run, f"{_list([n for n, _ in stuck])} had a gradient and did not move: a learning rate of "
                f"{_rate(run, p):g} is too small for {p.dtype}; raise lr, or attach with dtype=torch.float32"
            )  # fmt: skip
        now = checksums(run.model, {id(p) for p in _trained(run)})
        if changed := [name for name, crc in self.base.items() if now.get(name, crc) != crc]:
            raise _failed(
                run, f"the frozen base changed: {_list(changed)}; something other than this run's optimizer writes to "
                "it, or the adapter shares its tensors with it"
            )  # fmt: skip
        requested = list(_requested(run))
        if not self.reached:
            raise detached(run)
        complete = self._judge(run, {id(p) for _, p in requested})
        if not complete and run.step < self.last:
            return None
        self.before = []
        asleep = sum(id(p) not in self.reached for _, p in requested)
        rest = f", {asleep} parameters have none yet" if asleep else ""
        n = sum(p.numel() for _, p in requested)
        return (
            f"all {len(self.sites)} sites train: {n:,} values with gradients that move them{rest}; "
            f"the base is unchanged; {trained:,} tokens of the step carry loss"
        )

    def _judge(self, run: Run, requested: set[int]) -> bool:
        """Whether every site with something to train has been seen; raises at the last step if not."""
        sites = {s: [i for i in ids if i in requested] for s, ids in self.sites.items()}
        unseen = [s for s, ids in sites.items() if ids and self.felt.isdisjoint(ids)]
        if not unseen or run.step < self.last:
            return not unseen
        outside = [s for s in unseen if self.reached.isdisjoint(sites[s])]
        if outside:
            raise _failed(
                run, f"{_list(outside)} had no gradient: the loss does not depend on these modules; "
                "leave them out of targets"
            )  # fmt: skip
        raise _failed(
            run, f"{_list(unseen)} had gradients of exactly zero: all its factors start at zero, or what follows does; "
            "give the method another init"
        )  # fmt: skip


def detached(run: Run) -> DeltatuneError:
    """The error for a loss that depends on nothing trained."""
    if run.adapter is None:
        return _failed(run, "no parameter of the model had a gradient; set requires_grad on those to train")
    name = run.adapter.name
    return _failed(
        run, f"no parameter of adapter {name!r} had a gradient: it is not active, or none of its sites takes part in "
        f"the loss; activate(model, {name!r}), or choose other targets"
    )  # fmt: skip


def _failed(run: Run, why: str) -> DeltatuneError:
    return DeltatuneError(f"stopped at step {run.step}: {why}")


def _trained(run: Run) -> Iterator[nn.Parameter]:
    return run.model.parameters() if run.adapter is None else run.adapter.parameters()


def _sites(run: Run) -> dict[str, list[int]]:
    if run.adapter is None:
        return {"the model": [id(p) for p in run.model.parameters()]}
    return {name: [id(p) for p in unit.parameters()] for name, unit in run.adapter.units()}


def _requested(run: Run) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimizer was given to train: callbacks may have frozen some, or left some out."""
    assert run.optimizer is not None
    given = {id(p) for g in run.optimizer.param_groups if g["lr"] > 0 for p in g["params"]}
    source = run.model if run.adapter is None else run.adapter
    return ((n, p) for n, p in source.named_parameters() if id(p) in given and p.requires_grad)


def _rate(run: Run, p: nn.Parameter) -> float:
    assert run.optimizer is not None
    return next(g["lr"] for g in run.optimizer.param_groups if any(q is p for q in g["params"]))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
