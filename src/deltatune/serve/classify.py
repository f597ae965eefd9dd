"""Classes of texts and tags of words, under the head that an adapter was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from deltatune.core import DeltatuneError, adapters
from deltatune.serve.trunk import under_each

Given = str | tuple[str, str] | Sequence[str]


@dataclass(frozen=True)
class Prediction:
    """The likeliest class of a text, or tag of each of its words, and its probability."""

    label: str | list[str | None]
    probability: float | list[float | None]


@dataclass(frozen=True)
class _Reading:
    """How texts become batches, `batch_size` at once, of at most `max_length` tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int | None

    @property
    def tags(self) -> bool:
        return type(self.model).__name__.endswith("ForTokenClassification")

    def batches(self, texts: Sequence[Given]) -> Iterator[tuple[Sequence[Given], BatchEncoding]]:
        """Some of the texts and their tokens, in order; between the first and the last the model does not train."""
        model, kind = self.model, type(self.model).__name__
        if not kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
            raise DeltatuneError(f"{kind} tells no classes apart; load the base for classification or tagging")
        if self.tags and not self.tokenizer.is_fast:
            raise DeltatuneError("tagging needs a fast tokenizer: a slow one cannot say which word a token came from")
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        training = model.training
        model.eval()
        try:
            for start in range(0, len(texts), self.batch_size):
                some = texts[start : start + self.batch_size]
                batch = self.tokenizer(
                    list(some), is_split_into_words=self.tags, padding=True, padding_side="right", return_tensors="pt",
                    truncation=self.max_length is not None, max_length=self.max_length,
                )  # fmt: skip
                yield some, batch.to(model.device)
        finally:
            model.train(training)

    def told(self, logits: Tensor, names: Any, texts: Sequence[Given], batch: BatchEncoding) -> Iterator[Prediction]:
        top = logits.float().softmax(-1).max(-1)
        for i, text in enumerate(texts):
            if self.tags:
                yield _tagged(top.values[i], top.indices[i], batch.word_ids(i), len(text), names)
            else:
                yield Prediction(names[int(top.indices[i])], float(top.values[i]))


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
    reading = _Reading(model, tokenizer, batch_size, max_length)
    for some, batch in reading.batches(texts):
        yield from reading.told(model(**batch).logits, labels or model.config.id2label, some, batch)


def classify_each(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Given],
                  names: Sequence[str], *, batch_size: int = 32, max_length: int | None = None
                  ) -> Iterator[dict[str, Prediction]]:  # fmt: skip
    """The same under each of the adapters `names`, by name; what comes before the first unit of any of them is run
    once for all, see `under_each`."""
    reading = _Reading(model, tokenizer, batch_size, max_length)
    labels = {n: one.labels or model.config.id2label for n, one in adapters(model).items()}
    for some, batch in reading.batches(texts):
        outputs = under_each(model, names, **batch)
        columns = [list(reading.told(o.logits, labels[n], some, batch)) for n, o in outputs.items()]
        for row in zip(*columns, strict=True):
            yield dict(zip(outputs, row, strict=True))


def _tagged(values: Tensor, indices: Tensor, words: Sequence[int | None], n: int, names: Any) -> Prediction:
    """A word has the tag of its first token, on which it was learned."""
    first = {word: t for t, word in reversed(list(enumerate(words))) if word is not None}
    labels = [names[int(indices[first[w]])] if w in first else None for w in range(n)]
    return Prediction(labels, [float(values[first[w]]) if w in first else None for w in range(n)])
