"""Rungs cut from their blocks by size or by Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import runs_of
import torch
from ladders import build, ladders
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.ladder import Ladder, LadderSideTuning
from deltatune.train.training_data import TrainingData


def fisher(model: Any, losses: list[Any]) -> dict[str, Tensor]:
    """mean (dL/dW)^2 of every weight, by plain autograd."""
    total: dict[str, Tensor] = {}
    names, weights = zip(*[(n, p) for n, p in model.named_parameters() if p.ndim == 2], strict=True)
    for p in weights:
        p.requires_grad_(True)
    for loss in losses:
        for n, g in zip(names, torch.autograd.grad(loss(), weights, allow_unused=True), strict=True):
            if g is not None:
                total[n] = total.get(n, torch.zeros_like(g)) + g.square()
    return total


def chosen(importance: dict[str, Tensor], layers: int, d: int, ff: int) -> tuple[list[int], list[list[int]]]:
    """What of a tiny Llama is kept: units of the stream, and of each feed-forward layer, by plain products."""
    stream, inner = torch.ones(32, dtype=torch.float64), []
    for i in range(layers):
        w = {n.split(".")[-2]: t.double() for n, t in importance.items() if f"layers.{i}." in n}
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            stream = stream * w[name].sum(0) / w[name].sum()
        for name in ("o_proj", "down_proj"):
            stream = stream * w[name].sum(1) / w[name].sum()
        units = w["gate_proj"].sum(1) * w["up_proj"].sum(1) * w["down_proj"].sum(0)
        inner.append(sorted(units.argsort(descending=True)[:ff].tolist()))
    return sorted(stream.argsort(descending=True)[:d].tolist()), inner


def check_pruned(model: Any, u: Ladder, stream: list[int], inner: list[list[int]]) -> None:
    for layer, rung, units in zip(model.model.layers, u.side.rungs, inner, strict=True):
        own: Any = rung
        assert torch.equal(own.mlp.up_proj.weight, layer.mlp.up_proj.weight[units][:, stream])
        assert torch.equal(own.mlp.down_proj.weight, layer.mlp.down_proj.weight[stream][:, units])
        even = [h * 8 + i for h in range(4) for i in (0, 2, 4, 6)]  # rotary pairs keep every other frequency
        assert torch.equal(own.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[even][:, stream])
        assert torch.equal(own.input_layernorm.weight, layer.input_layernorm.weight[stream])


def test_rungs_begin_as_the_largest_rows_and_columns_of_their_blocks() -> None:
    model = build("llama")
    sizes = {n: p.detach().abs() for n, p in model.named_parameters() if p.ndim == 2}
    ((_, _, u),) = ladders(dt.attach(model, LadderSideTuning(reduction=2)))
    check_pruned(model, u, *chosen(sizes, 2, 16, 32))


def test_values_and_their_output_keep_the_same_units_of_each_head() -> None:
    model = build("gpt2")
    w = {n: p.detach() for n, p in model.named_parameters()}
    ((_, _, u),) = ladders(dt.attach(model, LadderSideTuning(reduction=2)))
    for i, rung in enumerate(u.side.rungs):
        own: Any = rung
        q, k, v = w[f"transformer.h.{i}.attn.c_attn.weight"].abs().sum(0).view(3, 4, 8)
        out = w[f"transformer.h.{i}.attn.c_proj.weight"].abs().sum(1).view(4, 8)
        bias = w[f"transformer.h.{i}.attn.c_attn.bias"].view(3, 4, 8)
        keys, values = ((score.argsort(1)[:, -4:].sort(1).values) for score in (q * k, v * out))
        want = torch.stack([b.gather(1, at) for b, at in zip(bias, (keys, keys, values), strict=True)])
        assert torch.equal(own.attn.c_attn.bias, want.flatten())


def test_fisher_pruning_takes_squared_gradients_of_the_base_at_train_start() -> None:
    model = build("llama")
    data = TrainingData(model, dt_batches(), torch.device("cpu"), torch.float32)
    twin = build("llama")
    want = fisher(twin, [lambda b=b: alone(twin, b) for b in range(3)])
    adapter = dt.attach(model, LadderSideTuning(reduction=2, init=dt.PrunedByFisher(batches=3)))
    ((_, _, u),) = ladders(adapter)
    by_size = [r.clone() for r in u.side.rungs.parameters()]
    dt.initialise(adapter, data.losses)
    check_pruned(model, u, *chosen(want, 2, 16, 32))
    assert any(not torch.equal(a, b) for a, b in zip(by_size, u.side.rungs.parameters(), strict=True))
    assert not [n for n, p in model.named_parameters() if p.grad is not None]
    with pytest.raises(dt.DeltatuneError, match="waits for data"):
        dt.initialise(adapter, data.losses)


def dt_batches() -> Any:
    from deltatune.data import Batches

    return Batches(runs_of.documents(), batch_size=4)


def alone(model: Any, index: int) -> Tensor:
    """The mean loss of one micro-batch, by hand."""
    batch = next(islice(dt_batches().once(), index, None))
    logits = model(**batch.inputs).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())


def test_a_run_from_fisher_pruning_resumes_and_a_loaded_ladder_is_not_pruned_again(tmp_path: Any) -> None:
    method = LadderSideTuning(reduction=2, init=dt.PrunedByFisher(batches=2))
    adapter, result = runs_of.run_on_llama(method, tmp_path, stop=3)
    assert result.loss is not None and result.history[-1]["loss"] < result.history[0]["loss"]
    adapter.save(tmp_path / "saved")
    again = dt.load(build("llama"), tmp_path / "saved")
    assert not any(u.waits for _, _, u in ladders(again))
    unused: Iterator[Tensor] = iter(())
    with pytest.raises(dt.DeltatuneError, match="waits for data"):
        dt.initialise(again, lambda n: unused)
