from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune.core import activate, attach
from deltatune.core.errors import DeltatuneError
from deltatune.data import Batches, Example, packed, padded
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny
from deltatune.routers.per_row import PerRow
from deltatune.train import loss
from deltatune.train.loop import fit
from deltatune.train.loss import evaluate, outcome
from deltatune.train.options import TrainOptions


@pytest.fixture(params=["chunks", "logits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the loss of a language model: by chunks of rows, and by the logits of all trained tokens."""
    if request.param == "logits":
        monkeypatch.setattr(loss, "loss_by_chunks", lambda *a: None)


def _documents(lengths: Sequence[int] = (9, 5, 7), prompt: int = 3) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    found = []
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 99, (n,), generator=g).tolist()
        found.append(Example(ids, [-100] * prompt + ids[prompt:], f"a.jsonl:{i + 1}"))
    return found


def _by_hand(logits: Tensor, labels: list[int]) -> float:
    """The negative log-likelihood of each label that follows a position, one at a time."""
    total, logits = 0.0, logits.detach().double()
    for t in range(len(labels) - 1):
        if labels[t + 1] != -100:
            total -= float(logits[t, labels[t + 1]] - torch.logsumexp(logits[t], 0))
    return total


def _trained_head(model: Any) -> None:
    adapter = attach(model, LoRA(r=2, targets=("lm_head", ".*(q_proj|c_attn|query_key_value)")))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_causal_loss_is_the_sum_over_trained_tokens_of_each_document(family: str, adapted: bool, way: None) -> None:
    torch.manual_seed(0)
    model: Any = tiny(family, **({"final_logit_softcapping": 3.0} if family == "gemma2" else {}))
    if adapted:
        _trained_head(model)
    documents = _documents()
    want = sum(_by_hand(model(input_ids=torch.tensor([e.input_ids])).logits[0], e.labels) for e in documents)
    found = outcome(model, padded(documents, pad=0), "causal")
    assert found.targets == sum(e.trained for e in documents)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(want, rel=2e-6)
    if family not in ("bloom", "opt"):  # they do not derive a mask from positions
        both = packed([documents[:2], documents[2:]], pad=0)
        assert outcome(model, both, "causal").total.item() == pytest.approx(want, rel=2e-6)


def test_where_logits_are_made_they_are_of_positions_that_carry_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "loss_by_chunks", lambda *a: None)
    model: Any = tiny("llama")
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    documents = _documents()
    outcome(model, packed([documents], pad=0), "causal")
    assert seen == [(1, sum(e.trained for e in documents), 99)]
    assert not model.lm_head._forward_pre_hooks


def test_gradients_are_those_of_the_whole_logits(way: None) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    batch = padded(_documents(), pad=0)
    outcome(model, batch, "causal").total.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(**batch.inputs).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum").backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-5)


def test_rows_with_adapters_of_their_own_keep_all_logits() -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    for name in ("one", "two"):
        adapter = attach(model, LoRA(r=2, targets="lm_head"), name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(std=0.3)
    documents = _documents((8, 6))
    want = 0.0
    for name, e in zip(("one", "two"), documents, strict=True):
        activate(model, name)
        want += outcome(model, padded([e], pad=0), "causal").total.item()
    activate(model, router=PerRow(["one", "two"]))
    assert outcome(model, padded(documents, pad=0), "causal").total.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_sequence_to_sequence_loss_is_the_models_own(family: str, way: None) -> None:
    torch.manual_seed(0)
    model: Any = tiny(family)
    examples = [Example([5, 6, 7, 2], [9, 8, 2], "a"), Example([11, 2], [12, 13, 14, 2], "b")]
    batch = padded(examples, pad=0, task="seq2seq")
    found = outcome(model, batch, "seq2seq")
    assert found.targets == 7
    assert found.total.item() / 7 == pytest.approx(model(**batch.inputs, labels=batch.labels).loss.item(), rel=1e-5)


def test_classes_and_tags_agree_with_a_loop_and_count_hits() -> None:
    torch.manual_seed(0)
    model: Any = tiny("bert", "classification")
    examples = [Example([5, 6, 7], [0], "a"), Example([8, 9], [2], "b"), Example([4], [1], "c")]
    found = outcome(model, padded(examples, pad=0, task="classification"), "classification")
    logits = [model(input_ids=torch.tensor([e.input_ids])).logits[0].detach().double() for e in examples]
    want = sum(float(torch.logsumexp(x, 0) - x[e.labels[0]]) for x, e in zip(logits, examples, strict=True))
    assert found.total.item() == pytest.approx(want, rel=1e-5)
    hits = sum(int(x.argmax()) == e.labels[0] for x, e in zip(logits, examples, strict=True))
    held_out = Batches(examples, task="classification", batch_size=2)
    scores = evaluate(model, held_out)
    assert scores == {"eval_loss": pytest.approx(want / 3, rel=1e-5), "eval_accuracy": hits / 3}

    tagger: Any = tiny("bert", "tokens")
    tagged = [Example([5, 6, 7], [0, -100, 2], "a"), Example([8, 9], [1, 1], "b")]
    want, n = 0.0, 0
    for e in tagged:
        rows = tagger(input_ids=torch.tensor([e.input_ids])).logits[0].detach().double()
        for x, label in zip(rows, e.labels, strict=True):
            if label != -100:
                want, n = want + float(torch.logsumexp(x, 0) - x[label]), n + 1
    found = outcome(tagger, padded(tagged, pad=0, task="tagging"), "tagging")
    assert (found.targets, found.total.item()) == (n, pytest.approx(want, rel=1e-5))


def test_evaluation_weighs_tokens_not_batches() -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama").train()
    documents = _documents((20, 5, 6))
    totals = [outcome(model, padded([e], pad=0), "causal").total.item() for e in documents]
    want = sum(totals) / sum(e.trained for e in documents)
    batches = Batches(documents, batch_size=1)
    assert evaluate(model, batches)["eval_loss"] == pytest.approx(want, rel=1e-6)
    assert model.training and batches.state_dict()["step"] == 0
    assert want != pytest.approx(sum(t / e.trained for t, e in zip(totals, documents, strict=True)) / 3, rel=1e-3)


def test_a_model_with_the_wrong_head_is_named() -> None:
    with pytest.raises(DeltatuneError, match=r"logits of shape \(1, 3\) for labels of shape \(1, 9\).*'causal'"):
        outcome(tiny("bert", "classification"), padded(_documents((9,)), pad=0), "causal")
    with pytest.raises(DeltatuneError, match="no encoder-decoder"):
        outcome(tiny("llama"), padded([Example([5], [6], "a")], pad=0, task="seq2seq"), "seq2seq")


def _wanted(model: Any, batches: Batches, smoothing: float) -> Tensor:
    """torch's own smoothed loss of all rows, in double precision, by the token."""
    total, n = torch.zeros((), dtype=torch.double), 0
    for batch in batches.once():
        logits, labels = model(**batch.inputs).logits.double(), batch.labels
        if batches.task == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        rows, labels = logits.reshape(-1, logits.shape[-1]), labels.flatten()
        total = total + nn.functional.cross_entropy(rows, labels, reduction="sum", label_smoothing=smoothing)
        n += int((labels != -100).sum())
    return total / n


@pytest.mark.parametrize("task", ["causal", "classification"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_run_smooths_the_labels_it_trains_on_and_not_those_it_is_measured_by(
    task: Any, smoothing: float, way: None
) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama") if task == "causal" else tiny("bert", "classification")
    adapter = attach(model, LoRA(r=2))
    examples = _documents() if task == "causal" else [Example([5, 6, 7], [0], "a"), Example([8, 9], [2], "b")]
    batches = Batches(examples, task=task, batch_size=1)
    want, plain = (_wanted(model.eval(), batches, e) for e in (smoothing, 0.0))
    want.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in adapter.parameters()])  # type: ignore[misc]
    model.zero_grad()
    options = TrainOptions(max_steps=1, batch_size=len(examples), lr=1e-12, clip=None,
                           precision="fp32", label_smoothing=smoothing)  # fmt: skip
    (record,) = [r for r in fit(model, adapter, batches, eval_batches=batches, options=options).history if "loss" in r]
    assert record["loss"] == pytest.approx(want.item(), rel=5e-6)
    assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert record["eval_loss"] == pytest.approx(plain.item(), rel=5e-6)
    assert bool(smoothing) is (abs(record["loss"] - record["eval_loss"]) > 1e-3)


@pytest.mark.parametrize("family", ["gemma2", "bloom", "t5"])
@pytest.mark.parametrize("adapted", [False, True])
def test_smoothed_gradients_are_those_of_the_logits(family: str, adapted: bool, way: None) -> None:
    torch.manual_seed(0)
    model: Any = tiny(family, **({"final_logit_softcapping": 3.0} if family == "gemma2" else {}))
    if adapted and family != "t5":
        _trained_head(model)
    task: Any = "seq2seq" if family == "t5" else "causal"
    examples = [Example([5, 6, 7, 2], [9, 8, 2], "a"), Example([11, 2], [12, 13, 14, 2], "b")]
    batch = padded(examples if family == "t5" else _documents(), pad=0, task=task)
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = outcome(model, batch, task, smoothing=0.2)
    mine = torch.autograd.grad(found.total, leaves, allow_unused=True)
    logits = model(**batch.inputs, **({"labels": batch.labels} if family == "t5" else {})).logits
    rows, labels = (logits, batch.labels) if family == "t5" else (logits[:, :-1], batch.labels[:, 1:])
    want = nn.functional.cross_entropy(rows.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.2)
    assert found.total.item() == pytest.approx(want.item(), rel=5e-6)
    for one, other in zip(mine, torch.autograd.grad(want, leaves, allow_unused=True), strict=True):
        assert (one is None) is (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)
