"""Mix-And-Match: its two halves, alone and together."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.core import flatten
from deltatune.methods.parallel import Bottleneck
from deltatune.methods.prefix import Prefix
from deltatune.models.tiny import inputs, tiny

FAMILIES = ["llama", "gpt2", "bert", "t5"]


def randomise(adapter: dt.Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_the_sum_of_its_halves(family: str) -> None:
    model = tiny(family)
    halves = dt.PrefixTuning(length=3, hidden=5), dt.ParallelAdapter(size=4)
    total = dt.plan(model, dt.MAM(length=3, hidden=5, size=4)).trained
    assert total == sum(dt.plan(model, m).trained for m in halves) == dt.plan(model, dt.Union(methods=halves)).trained


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_adapters_it_is_prefix_tuning(family: str) -> None:
    """s = 0 leaves the prefix; with the prefix alone taken over, the outputs agree."""
    torch.manual_seed(0)
    model = tiny(family)
    batch = inputs(model)
    mam = dt.attach(model, dt.MAM(length=3, hidden=5, size=4, scale=0.0), "mam")
    randomise(mam)
    prefix = dt.attach(model, dt.PrefixTuning(length=3, hidden=5), "prefix")
    tensors = mam.state_dict()
    prefix.load_state_dict({k: tensors[k] for k in prefix.state_dict()})
    want = model(**batch).logits
    dt.activate(model, "mam")
    torch.testing.assert_close(model(**batch).logits, want)
    for _, unit in mam.units():
        if isinstance(unit, Bottleneck):
            unit.s = 4.0
    assert (model(**batch).logits - want).abs().max() > 1e-3


def test_prefix_flattens_and_is_saved_without_its_network(tmp_path) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    batch = inputs(model)
    adapter = dt.attach(model, dt.MAM(length=3, hidden=5, size=4))
    randomise(adapter)
    want = model(**batch).logits
    flatten(adapter)
    assert torch.equal(model(**batch).logits, want)
    adapter.save(tmp_path)
    dt.detach(model)
    back = dt.load(model, tmp_path)
    assert back.method == dt.MAM(length=3, hidden=None, size=4)
    assert torch.equal(model(**batch).logits, want)
    # per block: a prefix of 2 p (kv heads) d_h, an adapter of 2 d m + m + d
    assert sum(p.numel() for p in back.parameters()) == 2 * (2 * 3 * 2 * 8 + 2 * 32 * 4 + 4 + 32)


def test_both_halves_train() -> None:
    torch.manual_seed(0)
    model = tiny("bert")
    batch = inputs(model)
    adapter = dt.attach(model, dt.MAM(length=2, hidden=4, size=3))
    kinds = {type(u) for _, u in adapter.units()}
    assert {Prefix, Bottleneck} <= kinds
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
