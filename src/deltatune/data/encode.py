"""Items to training examples: token ids and labels, with a summary of what became of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    one class id (classification), or a tag id per token (tagging). ``adapter`` is that of its row, as `PerRow` names
    it, such as a task of a prompt for several; None is whichever is active."""

    input_ids: list[int]
    labels: list[int]
    origin: str = ""
    adapter: str | None = None

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
        text = (
            f"{self.source}: {self.rows:,} rows ({self.format}), {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained, longest {self.longest:,}"
        )
        counts = {"truncated": self.truncated, "dropped as too long": self.dropped,
                  "left out because none of their tokens is trained": self.untrained}  # fmt: skip
        template = (f"template {self.template}",) if self.template else ()
        return "; ".join([text, *(f"{n:,} {what}" for what, n in counts.items() if n), *template, *self.notes])


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
    usual: dict[type, Task] = {Labelled: "classification", Tagged: "tagging", Pair: "seq2seq"}
    chosen = task or usual.get(type(first), "causal")
    items = [_suited(item, chosen) for item in data.items]
    notes = ["of each preference only the chosen answer is used"] if isinstance(first, Preference) else []
    used = resolve(template, tokenizer) if any(isinstance(item, Conversation) for item in items) else None
    if used and template is None and used.name != "chat":
        notes.append(f"the tokenizer has no chat template, so {used.name} was taken")
    names = _names(items, label_names) if chosen in ("classification", "tagging") else None
    encoders: dict[Task, Callable[..., Example]] = {
        "causal": _cut, "seq2seq": _seq2seq, "classification": _classes, "tagging": _tags
    }  # fmt: skip
    encode = partial(encoders[chosen], tokenizer, {name: i for i, name in enumerate(names or [])})
    wholes = _causal(items, tokenizer, used, train_on) if chosen == "causal" else (encode(item, None) for item in items)

    kept: list[Example] = []
    found, truncated, dropped, untrained = Problems(), 0, 0, 0
    for item, example in zip(items, wholes, strict=True):
        if max_length is not None and len(example) > max_length:
            if too_long == "refuse":
                found.add(example.origin, f"{len(example)} tokens, but max_length is {max_length}")
            if too_long != "truncate":
                dropped += 1
                continue
            example, truncated = encode(example if chosen == "causal" else item, max_length), truncated + 1
        if example.trained:
            kept.append(replace(example, adapter=data.adapters.get(example.origin)) if data.adapters else example)
        else:
            untrained += 1
    found.done("raise max_length, or set too_long to truncate or drop")
    summary = Summary(
        data.source, data.format, chosen, used.name if used else None, len(items), len(kept),
        sum(len(e.input_ids) for e in kept), sum(e.trained for e in kept), max(map(len, kept), default=0),
        truncated, dropped, untrained, tuple(notes),
    )  # fmt: skip
    if not kept:
        raise DataError(f"{data.source}: nothing is left to train on. {summary}")
    return Encoded(kept, summary, names)


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


def _causal(items: list[Any], tokenizer: PreTrainedTokenizerBase, template: Template | None, train_on: TrainOn
            ) -> Iterator[Example]:  # fmt: skip
    head = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    tail = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    talks = (item for item in items if isinstance(item, Conversation))
    rendered = tokenise(talks, tokenizer, template, train_on) if template else iter(())
    for item in items:
        if isinstance(item, Text):
            ids = head + tokenizer(item.text, add_special_tokens=False, verbose=False)["input_ids"] + tail
            mask = [True] * len(ids)
        else:
            ids, mask = next(rendered)
        # Nothing predicts a document's first token; in a packed row the document before it would.
        labels = [token if trained and i else IGNORED for i, (token, trained) in enumerate(zip(ids, mask, strict=True))]
        yield Example(ids, labels, item.origin)


Ids = dict[str, int]


def _cut(_: PreTrainedTokenizerBase, __: Ids, whole: Example, n: int) -> Example:
    return Example(whole.input_ids[:n], whole.labels[:n], whole.origin)


# The others tokenise again to be cut: special tokens at the end of an encoder's input must survive.
def _seq2seq(tokenizer: PreTrainedTokenizerBase, _: Ids, item: Pair, n: int | None) -> Example:
    room: dict[str, Any] = {"truncation": n is not None, "max_length": n, "verbose": False}
    labels = tokenizer(text_target=item.target, **room)["input_ids"]
    if tokenizer.eos_token_id is not None and labels[-1:] != [tokenizer.eos_token_id]:
        labels = [*labels[: None if n is None else n - 1], tokenizer.eos_token_id]
    return Example(tokenizer(item.source, **room)["input_ids"], labels, item.origin)


def _classes(tokenizer: PreTrainedTokenizerBase, ids: Ids, item: Labelled, n: int | None) -> Example:
    out = tokenizer(item.text, item.pair, truncation=n is not None, max_length=n, verbose=False)
    return Example(out["input_ids"], [ids[str(item.label)]], item.origin)


def _tags(tokenizer: PreTrainedTokenizerBase, ids: Ids, item: Tagged, n: int | None) -> Example:
    if not tokenizer.is_fast:
        raise DeltatuneError("tagging needs a fast tokenizer: a slow one cannot say which word a token came from")
    out = tokenizer(item.tokens, is_split_into_words=True, truncation=n is not None, max_length=n, verbose=False)
    words = [None, *out.word_ids()]  # a tag is learned on the first token of its word
    pairs = zip(words, words[1:], strict=False)
    labels = [IGNORED if word in (None, last) else ids[str(item.tags[word])] for last, word in pairs]
    return Example(out["input_ids"], labels, item.origin)


def _names(items: list[Any], given: Sequence[str] | None) -> list[str]:
    """The label names: those given, else the distinct labels, numbers in order and names by first appearance."""
    labels = [(item, str(x)) for item in items for x in ([item.label] if isinstance(item, Labelled) else item.tags)]
    if given is None:
        names = list(dict.fromkeys(label for _, label in labels))
        return sorted(names, key=int) if all(name.lstrip("-").isdecimal() for name in names) else names
    known, found = set(given), Problems()
    for item, label in labels:
        if label not in known:
            found.add(item.origin, f"unknown label {label!r} (known: {', '.join(given)}){nearest(label, given)}")
    found.done()
    return list(given)
