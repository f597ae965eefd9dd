from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from deltatune.core.errors import DeltatuneError
from deltatune.data import Example, attention_mask_4d, pack, packed, padded


def _example(length: int, seed: int) -> Example:
    ids = torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [-100 if i < length // 3 else t for i, t in enumerate(ids)], f"f.jsonl:{seed}")


def _llama(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def _gpt2(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


ROWS = [[_example(5, 0), _example(1, 1), _example(9, 2), _example(1, 3)], [_example(2, 4), _example(7, 5)]]


@pytest.mark.parametrize("family", [_llama, _gpt2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("explicit", [False, True], ids=["positions", "mask"])
def test_packed_equals_documents_run_alone(family: object, attention: str, explicit: bool) -> None:
    """Logits and gradients, in float64, of each document alone (a plain forward) and within packed rows."""
    model = family(attention)  # type: ignore[operator]
    batch = packed(ROWS, pad=0)
    close = 1e-5 if attention == "eager" else 1e-9  # Llama's eager softmax is float32 whatever its input
    inputs = dict(batch.inputs)
    if explicit:
        inputs["attention_mask"] = attention_mask_4d(batch.segments, torch.float64)
    logits = model(**inputs).logits
    _loss(logits, batch.labels).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(ROWS):
        for segment, example in enumerate(row):
            alone = model(input_ids=torch.tensor([example.input_ids])).logits
            torch.testing.assert_close(logits[i][batch.segments[i] == segment], alone[0], rtol=0, atol=close)
            if len(example) > 1:
                total = total + _loss(alone, torch.tensor([example.labels]))
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=close)


def test_the_reference_can_tell_contamination() -> None:
    model, batch = _llama("sdpa"), packed(ROWS, pad=0)
    good = model(**batch.inputs).logits
    mixed = model(input_ids=batch.inputs["input_ids"]).logits
    cached = model(**{**batch.inputs, "use_cache": True}).logits  # a cache turns the detection off
    later = batch.segments == 1
    assert (good - mixed)[later].abs().max() > 1e-3 and (good - cached)[later].abs().max() > 1e-3


def test_packed_tensors() -> None:
    a, b, c = Example([1, 2], [1, 2], "a"), Example([3, 4, 5], [-100, 4, 5], "b"), Example([6], [6], "c")
    batch = packed([[a, b], [c]], pad=9)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 9, 9, 9, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert batch.labels.tolist() == [[-100, 2, -100, 4, 5], [-100] * 5]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1], [0, -1, -1, -1, -1]]
    assert (batch.origins, batch.tokens, batch.trained_tokens) == ([["a", "b"], ["c"]], 6, 3)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 100), st.integers(0, 9), st.integers(1, 50)
)
def test_every_document_once_and_no_row_over_full(lengths: list[int], capacity: int, seed: int, window: int) -> None:
    bins = pack(lengths, capacity, seed, window)
    assert sorted(i for row in bins for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in bins)
    assert bins == pack(lengths, capacity, seed, window)
    if window >= len(lengths):  # best fit leaves no two rows that could be one
        loads = sorted(sum(lengths[i] for i in row) for row in bins)
        assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_packing_is_dense_and_depends_on_the_seed() -> None:
    lengths = [(7 * i) % 90 + 5 for i in range(500)]
    bins = pack(lengths, 256, 0)
    assert sum(lengths) / (256 * len(bins)) > 0.97
    assert bins != pack(lengths, 256, 1)
    with pytest.raises(DeltatuneError, match="300 tokens does not fit into a row of 256"):
        pack([300], 256, 0)


def test_padding_on_either_side() -> None:
    a, b = Example([1, 2, 3], [-100, 2, 3], "a"), Example([4], [4], "b")
    right, left = padded([a, b], 0), padded([a, b], 0, side="left")
    assert right.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert right.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right.labels.tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert left.inputs["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert left.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left.labels.tolist() == [[-100, 2, 3], [-100, -100, 4]]
    assert left.segments.tolist() == [[0, 0, 0], [-1, -1, 0]]
    assert (right.tokens, right.trained_tokens, right.origins) == (4, 3, [["a"], ["b"]])


def test_padding_of_the_other_tasks() -> None:
    assert padded([Example([1, 2], [1]), Example([3], [0])], 0, "classification").labels.tolist() == [1, 0]
    tags = padded([Example([1, 2], [-100, 1]), Example([3], [0])], 0, "tagging", "left")
    assert tags.labels.tolist() == [[-100, 1], [-100, 0]]
    pairs = padded([Example([1], [5, 6]), Example([3, 4], [7])], 0, "seq2seq", "left")
    assert pairs.inputs["input_ids"].tolist() == [[0, 1], [3, 4]] and pairs.labels.tolist() == [[5, 6], [7, -100]]
