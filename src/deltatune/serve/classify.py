"""Classes of texts and tags of words, under the head that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltatune.core import DeltatuneError

Given = str | tuple[str, str] | Sequence[str]


@dataclass(frozen=True)
class Prediction:
    """The likeliest class of a text, or tag of each of its words, and its probability."""

    label: str | list[str | None]
    probability: float | list[float | None]


@torch.no_grad()
def classify(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Given], *,
             labels: Sequence[str] = (), batch_size: int = 32, max_length: int | None = None
             ) -> Iterator[Prediction]:  # fmt: skip
    """Of each of `texts`, in order, under the adapter that is active: a text or a pair of texts for a model that
    classifies sequences, a list of words for one that classifies tokens.

    labels: the names of the classes, by default those of the model's configuration. `activate` writes an adapter's
    there; `using`, which holds for one thread alone, does not: inside it give `adapters(model)[name].labels`.
    max_length: longer ones are cut, in tokens. A word that is cut off has tag None. Raises DeltatuneError for a model
    without classes."""
    kind = type(model).__name__
    if not kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        raise DeltatuneError(f"{kind} tells no classes apart; load the base for classification or tagging")
    tags = kind.endswith("ForTokenClassification")
    if tags and not tokenizer.is_fast:
        raise DeltatuneError("tagging needs a fast tokenizer: a slow one cannot say which word a token came from")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    names: Any = labels or model.config.id2label
    training = model.training
    model.eval()
    try:
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            batch = tokenizer(
                list(some), is_split_into_words=tags, padding=True, padding_side="right", return_tensors="pt",
                truncation=max_length is not None, max_length=max_length,
            )  # fmt: skip
            top = model(**batch.to(model.device)).logits.float().softmax(-1).max(-1)
            for i, text in enumerate(some):
                if tags:
                    yield _tagged(top.values[i], top.indices[i], batch.word_ids(i), len(text), names)
                else:
                    yield Prediction(names[int(top.indices[i])], float(top.values[i]))
    finally:
        model.train(training)


def _tagged(values: Tensor, indices: Tensor, words: Sequence[int | None], n: int, names: Any) -> Prediction:
    """A word has the tag of its first token, on which it was learned."""
    first = {word: t for t, word in reversed(list(enumerate(words))) if word is not None}
    labels = [names[int(indices[first[w]])] if w in first else None for w in range(n)]
    return Prediction(labels, [float(values[first[w]]) if w in first else None for w in range(n)])
