"""P-Tuning v2: prefix tuning's flat prefix at every layer, and the head of a classifier."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.methods.p_tuning_v2 import PTuningV2, _Classifier
from deltatune.methods.prefix import Prefix, PrefixTuning
from deltatune.methods.tune import Copy
from deltatune.models.tiny import inputs, tiny

ENCODERS = ("bert", "roberta")
HEADS = {("bert", "classification"): {"classifier"}, ("bert", "tokens"): {"classifier"},
         ("roberta", "classification"): {"classifier.dense", "classifier.out_proj"},
         ("roberta", "tokens"): {"classifier"}}  # fmt: skip


def build(family, task="classification"):
    torch.manual_seed(0)
    return tiny(family, task)


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def heads_of(adapter):
    return [(path, u) for path, _, u, _ in adapter.sites() if isinstance(u, Copy)]


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_a_table_of_keys_and_values_and_the_head_are_trained(family, task):
    """2 L p D numbers and the head's; the pooler, the embeddings, everything else is the base's."""
    model = build(family, task)
    adapter = dt.attach(model, PTuningV2(length=5))
    heads = heads_of(adapter)
    assert {path for path, _ in heads} == HEADS[family, task]
    size = sum(p.numel() for path in HEADS[family, task] for n, p in model.get_submodule(path).named_parameters()
               if "adapters" not in n)  # fmt: skip
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 2 * 5 * 32 + size
    assert dt.plan(build(family, task), PTuningV2(length=5)).trained == 2 * 2 * 5 * 32 + size
    model.train()
    model(**inputs(model)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n.split("."))


@pytest.mark.parametrize(("family", "task"), HEADS)
@torch.no_grad()
def test_it_is_prefix_tuning_with_the_same_keys_and_values(family, task):
    model = build(family, task)
    batch = inputs(model)
    ours = dt.attach(model, PTuningV2(length=4), "v2")
    flat = dt.attach(model, PrefixTuning(length=4), "flat")
    for one, other in zip(*([u for _, u in a.units() if isinstance(u, Prefix)] for a in (ours, flat)), strict=True):
        other.source.load_state_dict(one.source.state_dict())
    dt.activate(model, "v2")
    got = model(**batch).logits
    dt.activate(model, "flat")
    assert torch.equal(model(**batch).logits, got)


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_a_masked_prefix_is_the_base_and_another_prefix_is_another_output(family):
    """The keys shift no position: a row that does not see them is the row of the base."""
    model = build(family)
    batch = inputs(model)
    alone = model(**batch).logits
    a = dt.attach(model, PTuningV2(length=3), "a")
    for _, u in heads_of(a):
        u.v.add_(torch.randn_like(u.v))  # the row has the base's head, too
    with dt.using(model, router=dt.PerRow(["a", None])):
        mixed = model(**batch).logits
    near(mixed[1], alone[1])
    near(mixed[0], model(**batch).logits[0])
    before = model(**batch).logits
    for _, u in a.units():
        if isinstance(u, Prefix):
            u.source.v.add_(torch.randn_like(u.source.v))
    assert (model(**batch).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "task"), HEADS)
@torch.no_grad()
def test_a_head_of_zeros_gives_the_same_logits_whatever_is_read(family, task):
    model = build(family, task)
    adapter = dt.attach(model, PTuningV2(length=3))
    for path, u in heads_of(adapter):
        if not path.endswith("dense") and u.v.ndim == 2:
            u.v.zero_()
    logits = model(**inputs(model)).logits
    near(logits, logits.flatten(0, -2)[0].expand_as(logits), 0)


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "t5", "bart"))
def test_a_language_models_head_is_left_alone(family):
    model = build(family, "lm")
    adapter = dt.attach(model, PTuningV2(length=3))
    assert not heads_of(adapter)
    assert dt.plan(build(family, "lm"), PTuningV2(length=3)) == dt.plan(build(family, "lm"), PrefixTuning(length=3))


def test_dropout_hides_some_of_the_prefix_in_training_alone():
    model = build("bert")
    batch = inputs(model)
    adapter = dt.attach(model, PTuningV2(length=8, dropout=0.5))
    with torch.no_grad():
        want = model(**batch).logits
        assert torch.equal(model(**batch).logits, want)
    model.train()
    one, two = model(**batch).logits, model(**batch).logits
    assert not torch.equal(one, two)
    unit = next(u for _, u in adapter.units() if isinstance(u, Prefix))
    seen = []
    unit(lambda q, k, v, m: seen.append(k[:, :, :8]), *torch.randn(3, 2, 4, 9, 8), torch.ones(2, 1, 9, 9).bool())
    kept = seen[0] / unit.source.k[None]
    assert set(kept.round(decimals=4).flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(kept[0], kept[1])  # rows apart
    for wrong in (1.0, -0.1):
        with pytest.raises(dt.DeltatuneError, match=r"PTuningV2: dropout must be .* below 1"):
            PTuningV2(dropout=wrong)


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_it_learns_and_is_saved_with_its_head(family, task, tmp_path):
    model, other = build(family, task).train(), build(family, task)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = inputs(model, batch=6)
    labels = torch.randint(3, batch["input_ids"].shape if task == "tokens" else (6,))
    adapter = dt.attach(model, PTuningV2(length=4, dropout=0.0), "v2")
    step = torch.optim.AdamW(adapter.parameters(), lr=PTuningV2.lr)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0], losses
    model.eval()
    adapter.save(tmp_path)
    again = dt.load(other, tmp_path)
    assert again.method == PTuningV2(length=4, dropout=0.0)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    dt.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_with_a_network_it_is_flattened_too():
    model = build("bert")
    adapter = dt.attach(model, PTuningV2(length=3, hidden=6))
    want = model(**inputs(model)).logits
    dt.flatten(adapter)
    assert torch.equal(model(**inputs(model)).logits, want)
    assert adapter.method == PTuningV2(length=3) and len(heads_of(adapter)) == 2


def test_where_no_part_finds_a_module_nothing_is_attached():
    """A language model has no classifier."""
    model = build("llama", "lm")
    types = [type(m) for m in model.modules()]
    for methods, told in (((_Classifier(),), r"_Classifier\(targets=None\)"), ((), "no method")):
        for do in (dt.attach, dt.plan):
            with pytest.raises(dt.DeltatuneError, match=rf"Union: {told} finds no module of LlamaForCausalLM.*targets"):
                do(model, dt.Union(methods=methods))
    assert [type(m) for m in model.modules()] == types and not dt.adapters(model)
    assert all(p.requires_grad for p in model.parameters())
