"""Documents in blocks of one row: what each gives alone, and the same gradients."""

import pytest
import torch

import deltatune as dt
from deltatune.data.encode import Example
from deltatune.data.loader import Batches
from deltatune.data.packing import blocked as one_row
from deltatune.data.packing import padded
from deltatune.models.blocks import Unsuitable, blockable, blocked, layout
from deltatune.models.tiny import tiny
from deltatune.train.loss import outcome

IDS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [5, 6, 7, 8, 3, 4, 5, 6]]
DOCUMENTS = [Example(ids, [-100] * 4 + ids[4:] if len(ids) > 4 else [-100, -100, -100, ids[3]], f"d{i}")
             for i, ids in enumerate(IDS)]  # fmt: skip
SUITED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "opt", "gemma3")
UNSUITED = ("bloom", "falcon", "gptj", "bert", "t5", "gemma2")


def made(family):
    torch.manual_seed(0)
    return tiny(family).train()


@pytest.mark.parametrize("family", SUITED)
def test_these_understand_a_layout(family):
    net = made(family)
    assert blockable(net, 12)
    assert net.config._attn_implementation == "sdpa" and net.training


@pytest.mark.parametrize("family", UNSUITED)
def test_these_do_not(family):
    assert not blockable(made(family), 12)


def test_dropout_of_attention_and_adapters_there_do_not():
    net = made("llama")
    net.config.attention_dropout = 0.1
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.1
    assert not blockable(net, 12)
    net = made("llama")
    dt.attach(net, dt.PrefixTuning(length=2))
    assert not blockable(net, 12)


def test_a_window_narrower_than_a_document_does_not():
    net = tiny("mistral", sliding_window=8)
    assert blockable(net, 8) and not blockable(net, 9)
    ids = list(range(5, 14))
    with blocked(net), pytest.raises(Unsuitable, match="sliding_window=8"):
        outcome(net, one_row([Example(ids, ids, "long")]), "causal")


def test_a_layout_that_is_taken_for_the_model_s_own_mask_is_noticed(monkeypatch):
    from deltatune.models import blocks

    monkeypatch.setattr(blocks, "attend", lambda q, k, v, layout, scale: torch.zeros_like(q).transpose(1, 2))
    assert not blockable(made("llama"), 12)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_loss_and_gradients_are_those_of_the_documents_alone(family, checkpointing):
    net = made(family)
    adapter = dt.attach(net, dt.LoRA(r=4))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    want = sum(outcome(net, padded([d], 0), "causal").total for d in DOCUMENTS)
    want.backward()
    grads = [p.grad.clone() for p in adapter.parameters()]
    adapter.model.zero_grad()
    if checkpointing is not None:
        net.activation_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            net.enable_input_require_grads()
    batch = one_row(DOCUMENTS)
    assert batch.blocks.shared == 2 and batch.inputs["input_ids"].shape == (1, 2 + 4 + 2 + 6)
    with blocked(net):
        found = outcome(net, batch, "causal")
        found.total.backward()
    assert found.targets == sum(sum(t != -100 for t in d.labels[1:]) for d in DOCUMENTS)
    torch.testing.assert_close(found.total, want)
    for p, g in zip(adapter.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=1e-4)


def test_outside_of_a_layout_the_model_is_as_ever():
    net = made("llama").eval()
    ids = torch.randint(5, 90, (2, 9))
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    want = net(input_ids=ids, attention_mask=mask).logits
    out = net.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with blocked(net):
        torch.testing.assert_close(net(input_ids=ids, attention_mask=mask).logits, want)
        assert torch.equal(net.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False), out)
        with layout(None):
            torch.testing.assert_close(net(input_ids=ids, attention_mask=mask).logits, want)


def test_batches_are_one_row_each_and_hold_every_document_once():
    examples = [
        Example([1, 2, *range(10 + i, 13 + 2 * i)], [-100, -100, -100, *range(11 + i, 13 + 2 * i)], f"r{i}")
        for i in range(9)
    ]
    found = Batches(examples, tokens_per_batch=40, packing=True, blocked=True, max_length=32)
    batches = list(found.once())
    assert sorted(o for b in batches for row in b.origins for o in row) == sorted(e.origin for e in examples)
    for b in batches:
        docs = [next(e for e in examples if e.origin == o) for o in b.origins[0]]
        assert b.tokens == sum(map(len, docs)) <= 40
        assert b.blocks.total == b.inputs["input_ids"].shape[1] == b.labels.shape[1]
        assert b.trained_tokens == sum(sum(t != -100 for t in e.labels[1:]) for e in docs)


def test_one_document_shares_nothing_and_a_trained_prompt_limits_what_is_shared():
    assert one_row(DOCUMENTS[:1]).blocks.shared == 0
    whole = [Example(ids, list(ids), "w") for ids in IDS]
    assert one_row(whole).blocks.shared == 0
    assert one_row([Example(IDS[0], [-100] * 5 + IDS[0][5:], "a")] * 2).blocks.shared == 4  # equal to the end
