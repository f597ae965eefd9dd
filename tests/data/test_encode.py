from __future__ import annotations

import pytest
from tiny_tokenizer import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltatune.data import DataError, Dataset, Rows, build, normalise


def _data(*rows: dict, **options: str) -> Dataset:
    return normalise(Rows("f.jsonl", list(rows), [f"f.jsonl:{i}" for i in range(1, len(rows) + 1)]), **options)


def _bert() -> PreTrainedTokenizerFast:
    """Words, with [CLS] and [SEP]; 'un' is a word piece of its own."""
    vocab = {name: i for i, name in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "un", "##a", "##b"])}
    raw = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


ROWS = [{"prompt": "How are you?", "completion": "Fine."}, {"prompt": "Who?", "completion": "A lamp " * 30}]


def test_labels_are_unshifted_and_only_on_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    encoded = build(_data(*ROWS), tokenizer)
    for example in encoded:
        assert len(example.labels) == len(example.input_ids)
        assert all(b in (-100, a) for a, b in zip(example.input_ids, example.labels, strict=True))
    assert tokenizer.decode([label for label in encoded[0].labels if label != -100]) == "Fine.<|im_end|>"
    assert encoded[1].origin == "f.jsonl:2"


def test_summary_counts() -> None:
    encoded = build(_data(*ROWS), tiny_tokenizer())
    summary = encoded.summary
    assert (summary.rows, summary.examples, summary.template) == (2, 2, "chat")
    assert summary.tokens == sum(len(e.input_ids) for e in encoded)
    assert summary.trained_tokens == sum(label != -100 for e in encoded for label in e.labels)
    assert summary.longest == len(encoded[1].input_ids)
    assert "2 rows (completion)" in str(summary) and "template chat" in str(summary)


def test_a_base_model_takes_the_tutorials_template_and_says_so() -> None:
    summary = build(_data(*ROWS), tiny_tokenizer(chat=False)).summary
    assert summary.template == "human-assistant"
    assert "no chat template, so human-assistant was taken" in str(summary)
    assert not build(_data(*ROWS), tiny_tokenizer(chat=False), template="human-assistant").summary.notes


def test_too_long() -> None:
    tokenizer, data = tiny_tokenizer(), _data(*ROWS)
    whole = build(data, tokenizer)
    cut = build(data, tokenizer, max_length=50)
    assert cut.summary.truncated == 1 and cut.summary.longest == 50
    assert cut[1].input_ids == whole[1].input_ids[:50] and cut[1].labels == whole[1].labels[:50]
    dropped = build(data, tokenizer, max_length=50, too_long="drop")
    assert dropped.summary.dropped == 1 and [e.origin for e in dropped] == ["f.jsonl:1"]
    with pytest.raises(DataError, match=rf"f.jsonl:2: {len(whole[1].input_ids)} tokens, but max_length is 50"):
        build(data, tokenizer, max_length=50, too_long="refuse")


def test_rows_without_a_trained_token_are_counted_and_left_out() -> None:
    tokenizer = tiny_tokenizer()
    data = _data({"messages": [{"role": "user", "content": "alone"}]}, {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})  # fmt: skip
    encoded = build(data, tokenizer)
    assert encoded.summary.untrained == 1 and [e.origin for e in encoded] == ["f.jsonl:2"]
    assert "1 left out because none" in str(encoded.summary)
    with pytest.raises(DataError, match="nothing is left"):
        build(data, tokenizer, max_length=3)
    assert build(data, tokenizer, train_on="all").summary.untrained == 0


def test_text_ends_and_is_trained_whole_but_for_its_first_token() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    (example,) = build(_data({"text": "The quick brown fox"}), tokenizer)
    assert example.input_ids == [*tokenizer("The quick brown fox")["input_ids"], tokenizer.eos_token_id]
    assert example.labels == [-100, *example.input_ids[1:]]


def test_beginning_of_sequence_only_where_the_tokenizer_adds_it() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for rows in ([{"text": "fox"}], ROWS):
        assert [e.input_ids[:2].count(1) for e in build(_data(*rows), tokenizer)] == [1] * len(rows)
        assert [e.input_ids.count(1) for e in build(_data(*rows), tokenizer)] == [1] * len(rows)
    assert 1 not in build(_data(*ROWS), tiny_tokenizer(chat=False))[0].input_ids


def test_classification() -> None:
    rows = [{"text": "a b c", "label": "no"}, {"text": "b", "label": "yes"}, {"text": "c", "label": "no"}]
    encoded = build(_data(*rows), _bert())
    assert encoded.label_names == ["no", "yes"] and encoded.id2label == {0: "no", 1: "yes"}
    assert [e.input_ids for e in encoded] == [[1, 4, 5, 6, 2], [1, 5, 2], [1, 6, 2]]
    assert [e.labels for e in encoded] == [[0], [1], [0]]
    cut = build(_data(*rows), _bert(), max_length=4)
    assert cut[0].input_ids == [1, 4, 5, 2]
    assert build(_data(*rows), _bert(), label_names=["yes", "no"])[0].labels == [1]
    with pytest.raises(DataError, match=r"f.jsonl:2: unknown label 'yes' \(known: no, yess\); did you mean 'yess'"):
        build(_data(*rows), _bert(), label_names=["no", "yess"])


def test_numbered_classes_are_sorted_by_number_and_pairs_are_joined() -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": n} for n in (10, 2)]
    encoded = build(_data(*rows), _bert())
    assert encoded.label_names == ["2", "10"] and encoded[0].labels == [1]
    assert encoded[0].input_ids == [1, 4, 2, 5, 2]


def test_tags_are_on_the_first_piece_of_each_word() -> None:
    data = _data({"tokens": ["a", "una", "b", "unb"], "tags": ["O", "X", "O", "Y"]})
    encoded = build(data, _bert())
    assert encoded[0].input_ids == [1, 4, 7, 8, 5, 7, 9, 2]
    assert encoded[0].labels == [-100, 0, 1, -100, 0, 2, -100, -100]
    assert encoded.label_names == ["O", "X", "Y"]
    cut = build(data, _bert(), max_length=5)
    assert cut[0].input_ids == [1, 4, 7, 8, 2] and cut[0].labels == [-100, 0, 1, -100, -100]


def test_pairs_suit_an_encoder_decoder_and_a_decoder() -> None:
    tokenizer, data = tiny_tokenizer(chat=False), _data({"source": "name: Oslo", "target": "Oslo is fine."})
    (example,) = build(data, tokenizer)
    assert example.input_ids == tokenizer("name: Oslo")["input_ids"]
    assert example.labels == [*tokenizer("Oslo is fine.")["input_ids"], tokenizer.eos_token_id]
    (cut,) = build(data, tokenizer, max_length=3)
    assert cut.input_ids == example.input_ids[:3]
    assert cut.labels == [*example.labels[:2], tokenizer.eos_token_id]
    (causal,) = build(data, tokenizer, task="causal")
    assert tokenizer.decode(causal.input_ids) == "Human: name: Oslo\n\nAssistant: Oslo is fine.</s>"
    (back,) = build(_data({"prompt": "name: Oslo", "completion": "Oslo is fine."}), tokenizer, task="seq2seq")
    assert back.input_ids == example.input_ids and back.labels == example.labels


def test_what_does_not_suit_the_task_is_refused() -> None:
    with pytest.raises(DataError, match="f.jsonl:1: a row of the form Text does not suit the task 'classification'"):
        build(_data({"text": "a"}), _bert(), task="classification")


def test_of_a_preference_the_chosen_answer_is_used() -> None:
    tokenizer = tiny_tokenizer()
    encoded = build(_data({"prompt": "Who?", "chosen": "A lamp", "rejected": "A fox"}), tokenizer)
    assert tokenizer.decode(encoded[0].input_ids).endswith("A lamp<|im_end|>\n")
    assert "only the chosen answer" in str(encoded.summary)
