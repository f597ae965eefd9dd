"""Rows that name their adapters: no logits of all tokens are made for them either, unless an adapter is at the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deltatune as dt
from deltatune.core import Method
from deltatune.data import Example, padded
from deltatune.kernels import cross_entropy
from deltatune.models.logits import Treatment
from deltatune.models.tiny import inputs, tiny
from deltatune.train import head
from deltatune.train.loss import outcome

IGNORED = -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four rows of 99 logits."""
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 4 * 99 * 4)


def adapt(model: Any, method: Method, name: str) -> None:
    adapter = dt.attach(model, method, name)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)), alpha=0.2)


def given(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    batch = inputs(model)
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    wanted = torch.randint(0, 99, ids.shape, generator=torch.Generator().manual_seed(3))
    wanted[0, :4] = wanted[1, -1] = IGNORED
    return batch, wanted


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_loss_and_gradients_are_those_of_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = tiny(family)
    found: list[Treatment | None] = []
    real = head.treatment
    monkeypatch.setattr(head, "treatment", lambda *a: found.append(real(*a)) or found[-1])
    for name, method in (("one", dt.LoRA(r=2)), ("two", dt.Pfeiffer(size=3)), ("three", dt.PrefixTuning(length=2))):
        adapt(model, method, name)
    leaves = [p for p in model.parameters() if p.requires_grad]
    batch, wanted = given(model)
    for rows in (["one", "two"], ["two", "one"], ["three", "two"], ["one", None], [None, "one"]):
        dt.activate(model, router=dt.PerRow(rows))
        loss = head.loss_by_chunks(model, batch, wanted, IGNORED)
        assert loss is not None and loss.targets == (wanted != IGNORED).sum()
        logits = model(**batch).logits
        want = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        torch.testing.assert_close(loss.total, want, rtol=2e-6, atol=0)
        assert loss.correct == (logits.argmax(-1) == wanted).sum()
        mine, other = (torch.autograd.grad(t, leaves, allow_unused=True) for t in (loss.total, want))
        scale = max(float(g.abs().max()) for g in other if g is not None)
        assert scale > 1e-3
        for a, b in zip(mine, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5 * scale)
    assert len(found) == 3  # how the model treats its logits is looked at once for each set of adapters


@pytest.mark.parametrize("rows", [["one", "two"], ["one", None]], ids=str)
def test_rows_with_adapters_at_the_head_keep_the_logits(rows: list[str | None]) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    adapt(model, dt.LoRA(r=2, targets=("lm_head", "q_proj")), "one")
    adapt(model, dt.LoRA(r=2), "two")
    batch, wanted = given(model)
    dt.activate(model, "two")
    assert head.loss_by_chunks(model, batch, wanted, IGNORED) is not None
    dt.activate(model, router=dt.PerRow(rows))
    assert head.loss_by_chunks(model, batch, wanted, IGNORED) is None
    dt.activate(model, router=dt.PerRow(["two", "two"]))
    assert head.loss_by_chunks(model, batch, wanted, IGNORED) is not None


@pytest.mark.parametrize("targets", ["q_proj", ("lm_head", "q_proj")], ids=["body", "head"])
def test_a_batch_whose_examples_name_adapters_makes_the_logits_that_carry_loss(
    targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    for name in ("one", "two"):
        adapt(model, dt.LoRA(r=2, targets=targets), name)
    texts = [Example([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], "a", adapter="one"),
             Example([11, 12, 13], [-100, 12, 13], "b", adapter="two")]  # fmt: skip
    want = 0.0
    for example in texts:
        dt.activate(model, str(example.adapter))
        alone = Example(example.input_ids, example.labels, example.origin)
        want += outcome(model, padded([alone], pad=0), "causal").total.item()
    dt.activate(model)
    batch = padded(texts, pad=0)
    assert outcome(model, batch, "causal").total.item() == pytest.approx(want, rel=1e-5)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    two_passes = outcome(model, batch, "causal", passes=2)  # which make logits, with or without chunks
    assert two_passes.total.item() == pytest.approx(want, rel=1e-5)
    assert seen == [(2, 5, 99) if "lm_head" in targets else (1, 5, 99)] * 2
