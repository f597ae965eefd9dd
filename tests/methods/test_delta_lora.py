"""Delta-LoRA: against a base that is really written step by step, and what its rank is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stages import batch, begin, change, deltas, go, loss, trained
from torch import nn

import deltatune as dt
from deltatune.core import Run


def by_hand(steps: int, ratio: float, first: int, start: list[tuple[torch.Tensor, torch.Tensor]], net: nn.Module):
    """W <- W + ratio s (dB A' + B dA) after every step t > first, and AdamW on A and B: what the paper says."""
    s, layers = 2.0, [net[0], net[2]]
    base = [m.weight.detach().clone() for m in layers]
    pairs = [(a.clone().requires_grad_(), torch.zeros_like(b).requires_grad_()) for a, b in start]
    optimizer = torch.optim.AdamW([p for pair in pairs for p in pair], lr=1e-2, weight_decay=0.0)
    for step in range(1, steps + 1):
        x, y = batch(step)
        h = torch.tanh(x @ (base[0] + s * pairs[0][1] @ pairs[0][0]).T + layers[0].bias)
        out = h @ (base[1] + s * pairs[1][1] @ pairs[1][0]).T + layers[1].bias
        optimizer.zero_grad()
        (out - y).square().mean().backward()
        old = [(a.detach().clone(), b.detach().clone()) for a, b in pairs]
        optimizer.step()
        if step > first:
            for i, ((a, b), (a0, b0)) in enumerate(zip(pairs, old, strict=True)):
                base[i] += ratio * s * ((b.detach() - b0) @ a.detach() + b0 @ (a.detach() - a0))
    return [w + s * (b @ a).detach() for w, (a, b) in zip(base, pairs, strict=True)]


@pytest.mark.parametrize("first", [0, 4])
def test_it_is_the_base_written_after_every_step(first: int) -> None:
    net, run, events = begin(dt.DeltaLoRA(ratio=0.7, start_steps=first), 12)
    base = [net[i].weight.detach().clone() for i in (0, 2)]
    want = by_hand(12, 0.7, first, [(d.a.detach(), d.b.detach()) for d in deltas(run)], net)
    go(run, events, 12)
    for d, w0, w in zip(deltas(run), base, want, strict=True):
        torch.testing.assert_close(d.weight(w0), w, rtol=1e-9, atol=1e-11)
        assert (d.weight(w0) - w0 - trained(d)).abs().max() > 1e-3
    assert all(torch.equal(net[i].weight, w0) for i, w0 in zip((0, 2), base, strict=True))


def test_the_products_telescope_and_the_rank_is_at_most_twice_r() -> None:
    net, run, events = begin(dt.DeltaLoRA(ratio=2.0, start_steps=4), 12)
    at: dict[int, list[torch.Tensor]] = {}
    go(run, events, 4, lambda step: at.update({step: [trained(d) for d in deltas(run)]}))
    assert all(torch.allclose(change(d), trained(d), atol=1e-15) for d in deltas(run))  # W rests until then
    go(run, events, 12)
    for d, then in zip(deltas(run), at[4], strict=True):
        torch.testing.assert_close(change(d), 3 * trained(d) - 2 * then, rtol=1e-12, atol=1e-13)
        assert torch.linalg.matrix_rank(change(d)) == 6 and d.constant.up.shape[1] == 6


def test_from_the_first_step_on_it_has_the_rank_of_lora() -> None:
    _, run, events = begin(dt.DeltaLoRA(ratio=2.0, start_steps=0), 8)
    go(run, events, 8)
    for d in deltas(run):
        torch.testing.assert_close(change(d), 3 * trained(d), rtol=1e-12, atol=1e-14)
        assert torch.linalg.matrix_rank(change(d), rtol=1e-10) == 3


def test_the_constant_has_no_gradient() -> None:
    """dL/dB is s G A^T with G = dL/dW', not (1 + ratio) times it."""
    net, run, events = begin(dt.DeltaLoRA(ratio=5.0, start_steps=0), 8)
    go(run, events, 3)
    d = deltas(run)[1]
    loss(net, 9).backward()
    x, y = batch(9)
    h = torch.tanh(x @ deltas(run)[0].weight(net[0].weight).T + net[0].bias).detach()
    out = (h @ d.weight(net[2].weight).T + net[2].bias).detach()
    full = (2 * (out - y) / out.numel()).T @ h
    torch.testing.assert_close(d.b.grad, d.s * full @ d.a.T, rtol=1e-10, atol=1e-14)


def test_a_second_run_goes_on_from_the_first(tmp_path: Path) -> None:
    net, run, events = begin(dt.DeltaLoRA(ratio=1.0, start_steps=2), 6)
    go(run, events, 6)
    out, kept = net(batch(1)[0]), [d.constant.up.clone() for d in deltas(run)]
    run.adapter.save(tmp_path)
    run = Run(net, run.adapter, 6, optimizer=run.optimizer)
    events = dt.DeltaLoRA(ratio=1.0, start_steps=0).start(run)
    events.on_train_start(run)
    torch.testing.assert_close(net(batch(1)[0]), out, rtol=1e-12, atol=1e-13)
    go(run, events, 6)
    assert all(torch.equal(d.constant.up[:, :6], k) for d, k in zip(deltas(run), kept, strict=True))
    dt.detach(net)
    dt.load(net, tmp_path)
    torch.testing.assert_close(net(batch(1)[0]), out, rtol=1e-12, atol=1e-13)


def test_wrong_use_is_refused() -> None:
    for wrong in ({"ratio": 0}, {"start_steps": -1}):
        with pytest.raises(dt.DeltatuneError, match="DeltaLoRA: ratio="):
            dt.DeltaLoRA(**wrong)
    with pytest.raises(dt.DeltatuneError, match="none of 4 steps"):
        begin(dt.DeltaLoRA(start_steps=4), 4)
    with pytest.raises(dt.DeltatuneError, match="dropout=0.1"):
        begin(dt.DeltaLoRA(start_steps=1), 4, dt.LoRA(r=2, dropout=0.1, targets="0"))
    with pytest.raises(dt.DeltatuneError, match="nothing in training"):
        begin(dt.DeltaLoRA(start_steps=1), 4, dt.Tune(targets="0"))


@pytest.mark.parametrize(
    "other", [dt.DeltaLoRA(start_steps=1), dt.ReLoRA(every=4, warmup=2, restart=1), dt.PeriodicLoRA(every=4)]
)
def test_the_adapter_has_one_constant_which_one_callback_keeps(other: dt.core.Callback) -> None:
    _, run, _ = begin(dt.DeltaLoRA(start_steps=1), 12)
    with pytest.raises(dt.DeltatuneError, match="DeltaLoRA keeps what was trained as a constant in this run already"):
        other.start(run)
