"""Cross-entropy of a head's logits, some rows at a time: the matrix (tokens, vocabulary) never exists.

    z = cap tanh(scale (h W^T + b) / cap)                 h (n, hidden), W (vocabulary, hidden); no cap: z = scale (...)
    loss = sum_i [ (1 - e) (lse(z_i) - z_i[t_i]) + e (lse(z_i) - mean(z_i)) ]              e: label smoothing

The loss is one number, so all that backward can bring is a factor to the gradient dloss/dh, which is as large as h.
The forward pass therefore makes it from each chunk of softmaxes while it has them, and keeps nothing else; a head that
trains has its own gradients summed over the chunks in the same way, in fp32 or wider.

A chunk is worked on in place. Per row i, o = sum over j != t of exp(z_j - max z) and s = o + exp(z_t - max z) are the
parts of the softmax; s dloss/dz_j is exp(z_j - max z) for j != t, and -o at the target. So nothing is subtracted from a
number close to it, however well a token is known, and the division by s waits for the smaller matrices that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltatune.kernels.device import kind

CHUNK = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes of logits at a time: enough rows to multiply well, and no more


def chunk_bytes(hidden: Tensor) -> int:
    return CHUNK.get(kind(hidden), CHUNK["cpu"])


class Loss(NamedTuple):
    """`total`: the sum over the `targets` rows that have one; `correct`: of how many it tops all other logits."""

    total: Tensor
    targets: int
    correct: Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                         scale: float = 1.0, cap: float | None = None, smoothing: float = 0.0, ignored: int = -100,
                         chunk: int | None = None) -> Loss:  # fmt: skip
    """hidden (..., h), weight (vocabulary, h), targets (...). Rows whose target is `ignored` never reach the head.

    Products run in the weight's precision, or autocast's; the softmax in fp32, or fp64 where they do. `chunk`: bytes of
    logits at a time."""
    rule = _Rule(scale, cap, smoothing)
    hidden, targets = _kept(hidden, targets, ignored)
    needs = tuple(torch.is_grad_enabled() and p is not None and p.requires_grad for p in (hidden, weight, bias))
    rows = _rows(len(targets), len(weight), _wide(_product_dtype(weight)), chunk or chunk_bytes(hidden))
    total, correct = _Linear.apply(hidden, weight, bias, targets, rule, needs, rows)
    return Loss(total, len(targets), correct)


def head_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, scale: float = 1.0,
                       cap: float | None = None, smoothing: float = 0.0, ignored: int = -100,
                       chunk: int | None = None) -> Loss:  # fmt: skip
    """The same for any `head`, (rows, h) -> (rows, vocabulary), that treats each row alone: it is called per chunk.

    Whatever trains in it, or before it, gets its gradient: the leaves are found in the graph of a first row."""
    rule = _Rule(scale, cap, smoothing)
    hidden, targets = _kept(hidden, targets, ignored)
    if not len(targets):
        return Loss(hidden.sum(dtype=_wide(hidden.dtype)), 0, targets.sum())
    first = head(hidden[:1].detach())
    inputs = [hidden, *_leaves(first)]
    needs = [torch.is_grad_enabled() and p.requires_grad for p in inputs]
    rows = _rows(len(targets), first.shape[-1], _wide(first.dtype), chunk or chunk_bytes(hidden))
    total, correct = _Called.apply(head, rows, targets, rule, needs, *inputs)
    return Loss(total, len(targets), correct)


def _kept(hidden: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if targets.device.type == "meta":  # shapes alone: every row counts
        return hidden, targets
    kept = (targets != ignored).nonzero().flatten()
    if len(kept) < len(targets):
        hidden, targets = hidden.index_select(0, kept.to(hidden.device)), targets[kept]
    return hidden, targets.to(hidden.device)


@dataclass(frozen=True)
class _Rule:
    """What becomes of logits, and the loss of that."""

    scale: float
    cap: float | None
    smoothing: float

    @property
    def alpha(self) -> float:
        """What a product is multiplied by, before tanh where there is a cap."""
        return self.scale if self.cap is None else self.scale / self.cap

    def apply(self, z: Tensor, targets: Tensor, slope: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """z (c, vocabulary): `alpha` times logits -> losses, hits and f (c, 1), so that dloss/dlogits is f z, where z
        is overwritten; that takes `gradient`. `slope`: room for as much again, needed where there is a cap."""
        if slope is not None and self.cap is not None:
            torch.mul(torch.tanh(z, out=slope), self.cap, out=z)
        at, vocabulary = targets[:, None], z.shape[1]
        own = z.gather(1, at)
        mean = z.mean(1, keepdim=True) if self.smoothing else None
        rest = z.scatter_(1, at, -torch.inf).amax(1, keepdim=True)
        top = torch.maximum(own, rest)
        others = z.sub_(top).exp_().sum(1, keepdim=True)
        hits = own > rest
        total = others + (own - top).exp()
        losses = torch.where(hits, others.log1p(), total.log()) + (top - own)
        if mean is not None:
            losses += self.smoothing * (own - mean)
        if gradient:
            if self.smoothing:
                z.sub_(total * (self.smoothing / vocabulary))
            z.scatter_(1, at, self.smoothing * (1 - 1 / vocabulary) * total - others)
            if slope is not None:
                z.mul_(torch.addcmul(slope.new_ones(()), slope, slope, value=-1, out=slope))  # tanh' = 1 - tanh^2
        return losses.flatten(), hits.flatten(), self.scale / total


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rule: _Rule,
                needs: tuple[bool, bool, bool], rows: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, vocabulary, dtype = len(targets), len(weight), _product_dtype(weight)
        wide = _wide(dtype)
        wide_logits = hidden.new_empty(rows, vocabulary, dtype=wide)
        logits = wide_logits if dtype is wide else torch.empty_like(wide_logits, dtype=dtype)
        slope = None if rule.cap is None else torch.empty_like(wide_logits)
        losses, hits = hidden.new_empty(n, dtype=wide), hidden.new_empty(n, dtype=torch.bool)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        dh = torch.empty_like(hidden, dtype=dtype) if needs[0] else None
        dw = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format) if needs[1] else None
        db = torch.zeros_like(b, dtype=wide) if b is not None and needs[2] else None
        with _no_autocast(hidden):
            for i in range(0, n, rows):
                x, t = hidden[i : i + rows].to(dtype), targets[i : i + rows]
                y, z = logits[: len(t)], wide_logits[: len(t)]
                if b is None:
                    y.addmm_(x, w.T, beta=0, alpha=rule.alpha)
                else:
                    torch.addmm(b, x, w.T, beta=rule.alpha, alpha=rule.alpha, out=y)
                if y.dtype is not wide:
                    z.copy_(y)
                part = None if slope is None else slope[: len(t)]
                losses[i : i + rows], hits[i : i + rows], f = rule.apply(z, t, part, any(needs))
                if db is not None:
                    db.addmv_(z.T, f.flatten())
                if y.dtype is not wide:
                    torch.mul(z, f, out=y)
                if dh is not None:
                    d = torch.mm(y, w, out=dh[i : i + rows])
                    if y.dtype is wide:
                        d.mul_(f)
                if dw is not None:
                    if y.dtype is wide:
                        dw.addmm_(z.T, x * f)
                    else:
                        dw.add_(y.T @ x)
        ctx.save_for_backward(dh, dw, db)
        ctx.dtypes = [None if p is None else p.dtype for p in (hidden, weight, bias)]
        correct = hits.sum()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *_times(ctx, grad), None, None, None, None


class _Called(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Callable[[Tensor], Tensor], rows: int, targets: Tensor, rule: _Rule,
                needs: list[bool], *inputs: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden, gradient, n = inputs[0], any(needs), len(targets)
        wanted = [p for p, needed in zip(inputs[1:], needs[1:], strict=True) if needed]
        sums = [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in wanted]
        dh = torch.empty_like(hidden) if needs[0] else None
        total, correct = [], []
        for i in range(0, n, rows):
            x = hidden[i : i + rows].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(gradient):
                logits = head(x)
            z = logits.detach().to(_wide(logits.dtype), copy=True).mul_(rule.alpha)
            slope = None if rule.cap is None else torch.empty_like(z)
            losses, hits, f = rule.apply(z, targets[i : i + rows].to(z.device), slope, gradient)
            total.append(losses.sum())
            correct.append(hits.sum())
            if gradient:
                if strange := {id(p) for p in _leaves(logits)} - {id(p) for p in (x, *wanted)}:
                    raise RuntimeError(f"the head made {len(strange)} parameters part of some rows' graph only")
                found = torch.autograd.grad(logits, [x, *wanted][not needs[0] :], z.mul_(f).to(logits.dtype),
                                            retain_graph=True, allow_unused=True)  # fmt: skip
                if dh is not None:
                    dh[i : i + rows] = found[0]
                for s, g in zip(sums, found[needs[0] :], strict=True):
                    if g is not None:
                        s.add_(g)
        given = iter(sums)
        ctx.save_for_backward(dh, *(next(given) if needed else None for needed in needs[1:]))
        ctx.dtypes = [p.dtype for p in inputs]
        hit = torch.stack(correct).sum()
        ctx.mark_non_differentiable(hit)
        return torch.stack(total).sum(), hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return None, None, None, None, None, *_times(ctx, grad)


def _times(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """What the forward pass saved, times what came back, in the precision of the inputs."""
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return [None if g is None else g.to(dtype) * grad.to(dtype) for g, dtype in saved]


def _rows(n: int, vocabulary: int, dtype: torch.dtype, chunk: int) -> int:
    """Rows of a chunk: as many as fit, but chunks of like size."""
    most = max(1, chunk // (vocabulary * dtype.itemsize))
    return -(-n // max(1, -(-n // most))) or 1


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product_dtype(weight: Tensor) -> torch.dtype:
    device = kind(weight)
    if weight.dtype is torch.float64 or not torch.amp.is_autocast_available(device):
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _no_autocast(hidden: Tensor) -> AbstractContextManager[Any]:
    device = kind(hidden)
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors that `output` sends gradients to."""
    found, seen, todo = [], set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        todo += [next_node for next_node, _ in node.next_functions]
    return found
