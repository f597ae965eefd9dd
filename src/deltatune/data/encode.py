"""Items to training examples: token ids and labels, with a summary of what became of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from deltatune.core.errors import DeltatuneError, nearest
from deltatune.data.formats import Conversation, Dataset, Item, Labelled, Pair, Preference, Tagged, Text
from deltatune.data.readers import DataError, Problems
from deltatune.data.templates import Template, TrainOn, adds_bos, resolve, tokenise

IGNORED = -100
Task = Literal["causal", "seq2seq", "classification", "tagging"]
TooLong = Literal["truncate", "refuse", "drop"]


@dataclass(frozen=True, slots=True)
class Example:
    """``labels`` are not shifted: ``labels[t]`` is ``input_ids[t]`` or -100 (causal), the target's ids (seq2seq),
    one class id (classification), or a tag id per token (tagging)."""

    input_ids: list[int]
    labels: list[int]
    origin: str = ""

    @property
    def trained(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def __len__(self) -> int:
        return max(len(self.input_ids), len(self.labels))


@dataclass(frozen=True)
class Summary:
    """What became of the rows: ``rows`` were read and ``examples`` are left, after ``dropped`` (too long) and
    ``untrained`` (no token carries loss) went; ``truncated`` were cut to ``max_length``."""

    source: str
    format: str
    task: Task
    template: str | None
    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int
    dropped: int
    untrained: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            f"{self.source}: {self.rows:,} rows ({self.format}), {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained ({self.trained_tokens / max(self.tokens, 1):.0%}), longest {self.longest:,}"
        ]
        parts += [f"{n:,} truncated" for n in [self.truncated] if n]
        parts += [f"{n:,} dropped as too long" for n in [self.dropped] if n]
        parts += [f"{n:,} left out because none of their tokens is trained" for n in [self.untrained] if n]
        parts += [f"template {self.template}" for _ in [0] if self.template]
        return "; ".join([*parts, *self.notes])


@dataclass(frozen=True)
class Encoded:
    """A sequence of examples; ``label_names[i]`` is the name of class or tag ``i``."""

    examples: list[Example]
    summary: Summary
    label_names: list[str] | None = None

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.label_names or []))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


def build(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: Task | None = None,
    template: str | Path | None = None,
    max_length: int | None = None,
    too_long: TooLong = "truncate",
    train_on: TrainOn = "response",
    label_names: Sequence[str] | None = None,
) -> Encoded:
    """Encodes every item for ``task`` (by default what its normal form is for).

    ``template`` as in `resolve`; ``max_length`` in tokens, of source and target each for seq2seq; ``label_names``
    fixes the classes, as for a held-out set. Raises `DataError` naming the rows that are longer than ``max_length``
    (``too_long="refuse"``), that do not suit the task, or whose class is unknown."""
    first = data.items[0]
    chosen: Task = task or {Labelled: "classification", Tagged: "tagging", Pair: "seq2seq"}.get(type(first), "causal")  # type: ignore[assignment]
    items = [_suited(item, chosen) for item in data.items]
    notes = []
    used: Template | None = None
    if chosen == "causal":
        used = resolve(template, tokenizer) if any(isinstance(item, Conversation) for item in items) else None
        if used and template is None and used.name != "chat":
            notes.append(f"the tokenizer has no chat template, so {used.name} was taken")
        if isinstance(first, Preference):
            notes.append("of each preference only the chosen answer is used")
        raw = _causal(items, tokenizer, used, train_on)
    elif chosen == "seq2seq":
        raw = _seq2seq(items, tokenizer)
    else:
        given = [x for item in items for x in ([item.label] if isinstance(item, Labelled) else item.tags)]  # type: ignore[union-attr]
        label_names = list(label_names) if label_names is not None else _names(given)
        raw = (_classes if chosen == "classification" else _tags)(items, tokenizer, label_names)

    kept: list[Example] = []
    found, truncated, dropped, untrained = Problems(), 0, 0, 0
    for example, cut in raw:
        if max_length is not None and len(example) > max_length:
            if too_long == "refuse":
                found.add(example.origin, f"{len(example)} tokens, but max_length is {max_length}")
            if too_long != "truncate":
                dropped += 1
                continue
            example, truncated = cut(max_length), truncated + 1
        if example.trained:
            kept.append(example)
        else:
            untrained += 1
    found.done("raise max_length, or set too_long to truncate or drop")
    names = list(label_names) if label_names is not None and chosen in ("classification", "tagging") else None
    summary = Summary(
        data.source, data.format, chosen, used.name if used else None, len(items), len(kept),
        sum(len(e.input_ids) for e in kept), sum(e.trained for e in kept), max(map(len, kept), default=0),
        truncated, dropped, untrained, tuple(notes),
    )  # fmt: skip
    if not kept:
        raise DataError(f"{data.source}: nothing is left to train on. {summary}")
    return Encoded(kept, summary, names)


# A raw example comes with the function that cuts it: special tokens at the end of an encoder's input must survive.
Raw = Iterator[tuple[Example, Callable[[int], Example]]]


def _slice(example: Example) -> Callable[[int], Example]:
    return lambda n: Example(example.input_ids[:n], example.labels[:n], example.origin)


def _suited(item: Item, task: Task) -> Item:
    """The item in the normal form that ``task`` learns from: pairs and conversations stand for one another."""
    if isinstance(item, Preference):
        item = Conversation(item.prompt + item.chosen, origin=item.origin)
    if isinstance(item, Labelled) and task in ("causal", "seq2seq"):
        item = Pair(item.text if item.pair is None else f"{item.text}\n{item.pair}", str(item.label), item.origin)
    if task == "causal" and isinstance(item, Pair):
        turns = [{"role": "user", "content": item.source}, {"role": "assistant", "content": item.target}]
        return Conversation(turns, origin=item.origin)
    if task == "seq2seq" and isinstance(item, Conversation):
        if len(item.messages) == 2 and all(isinstance(m["content"], str) for m in item.messages):
            return Pair(item.messages[0]["content"], item.messages[1]["content"], item.origin)
        raise DataError(f"{item.origin}: seq2seq needs one question and one answer, not {len(item.messages)} messages")
    wanted = {"causal": (Conversation, Text), "seq2seq": Pair, "classification": Labelled, "tagging": Tagged}[task]
    if not isinstance(item, wanted):  # type: ignore[arg-type]
        raise DataError(f"{item.origin}: a row of the form {type(item).__name__} does not suit the task {task!r}")
    return item


def _causal(items: list[Any], tokenizer: PreTrainedTokenizerBase, template: Template | None, train_on: TrainOn) -> Raw:
    head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    tail = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rendered = (
        tokenise((item for item in items if isinstance(item, Conversation)), tokenizer, template, train_on)
        if template
        else iter(())
    )
    for item in items:
        if isinstance(item, Text):
            ids = head + tokenizer(item.text, add_special_tokens=False, verbose=False)["input_ids"] + tail
            labels = list(ids)
        else:
            ids, mask = next(rendered)
            labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
        # Nothing predicts a document's first token; in a packed row the document before it would.
        example = Example(ids, [IGNORED, *labels[1:]] if ids else [], item.origin)
        yield example, _slice(example)


def _seq2seq(items: list[Any], tokenizer: PreTrainedTokenizerBase) -> Raw:
    def encode(pair: Pair, n: int | None) -> Example:
        room: dict[str, Any] = {"truncation": n is not None, "max_length": n, "verbose": False}
        ids = tokenizer(pair.source, **room)["input_ids"]
        labels = tokenizer(text_target=pair.target, **room)["input_ids"]
        if tokenizer.eos_token_id is not None and labels[-1:] != [tokenizer.eos_token_id]:
            labels = [*labels[: None if n is None else n - 1], tokenizer.eos_token_id]
        return Example(ids, labels, pair.origin)

    for item in items:
        yield encode(item, None), lambda n, item=item: encode(item, n)


def _classes(items: list[Any], tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> Raw:
    def encode(item: Labelled, n: int | None, label: int) -> Example:
        ids = tokenizer(item.text, item.pair, truncation=n is not None, max_length=n, verbose=False)["input_ids"]
        return Example(ids, [label], item.origin)

    ids = _label_ids(items, names, lambda item: [item.label])
    for item, (label,) in zip(items, ids, strict=True):
        yield encode(item, None, label), lambda n, item=item, label=label: encode(item, n, label)


def _tags(items: list[Any], tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> Raw:
    def encode(item: Tagged, n: int | None, tags: list[int]) -> Example:
        out = tokenizer(item.tokens, is_split_into_words=True, truncation=n is not None, max_length=n, verbose=False)
        words = out.word_ids()
        first = [word is not None and (i == 0 or words[i - 1] != word) for i, word in enumerate(words)]
        labels = [tags[word] if new else IGNORED for word, new in zip(words, first, strict=True)]
        return Example(out["input_ids"], labels, item.origin)

    if not tokenizer.is_fast:
        raise DeltatuneError("tagging needs a fast tokenizer: a slow one cannot say which word a token came from")
    ids = _label_ids(items, names, lambda item: item.tags)
    for item, tags in zip(items, ids, strict=True):
        yield encode(item, None, tags), lambda n, item=item, tags=tags: encode(item, n, tags)


def _names(labels: Sequence[str | int]) -> list[str]:
    """Distinct labels: numbers in order, names by first appearance."""
    distinct = list(dict.fromkeys(map(str, labels)))
    return sorted(distinct, key=int) if all(name.lstrip("-").isdecimal() for name in distinct) else distinct


def _label_ids(items: list[Any], names: Sequence[str], labels: Callable[[Any], Sequence[str | int]]) -> list[list[int]]:
    ids, found = {name: i for i, name in enumerate(names)}, Problems()
    for item in items:
        for label in {*map(str, labels(item))} - ids.keys():
            found.add(item.origin, f"unknown label {label!r} (known: {', '.join(names)}){nearest(label, ids)}")
    found.done()
    return [[ids[str(label)] for label in labels(item)] for item in items]
