"""A conversation as token ids, and which of them carry the loss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from deltatune.core.errors import DeltatuneError, nearest
from deltatune.data.formats import Conversation, Message
from deltatune.data.readers import DataError

TrainOn = Literal["response", "all"]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
NAMED = {
    # The template of the classic LoRA tutorials: 'Human: {instruction}\n{input}\n\nAssistant: {output}<eos>'.
    "human-assistant": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ 'Assistant: ' }}" + _ANSWER + "{% elif message.role == 'user' %}"
        "{{ 'Human: ' + message.content + '\n\n' }}{% else %}{{ message.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    # Stanford Alpaca's two prompts, with and without an input.
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'assistant' %}{{ '### Response:\n' }}" + _ANSWER + "{% elif message.role == 'user' %}"
        "{{ 'Below is an instruction that describes a task' }}"
        "{% if message.input %}{{ ', paired with an input that provides further context' }}{% endif %}"
        "{{ '. Write a response that appropriately completes the request.\n\n### Instruction:\n' }}"
        "{{ (message.instruction or message.content) + '\n\n' }}"
        "{% if message.input %}{{ '### Input:\n' + message.input + '\n\n' }}{% endif %}"
        "{% else %}{{ message.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether plain text begins with the tokenizer's beginning-of-sequence token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


@dataclass(frozen=True)
class Template:
    """``name`` is ``chat`` (the tokenizer's own), one of `NAMED`, or a path; ``source`` is its Jinja text."""

    name: str
    source: str

    def render(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any = None, *,
               add_generation_prompt: bool = False) -> str:  # fmt: skip
        """The text of ``messages``; with ``add_generation_prompt``, up to where the assistant would answer."""
        return self._jinja(tokenizer, messages, tools, add_generation_prompt, False)[0]

    def spans(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any = None
              ) -> tuple[str, list[Span]]:  # fmt: skip
        """The rendered text and the [start, end) characters of each assistant turn, its end-of-turn token included.

        A template that marks them with ``{% generation %}`` is believed. Otherwise each turn is found between the
        prompt that precedes it and the text up to it, both of which must be prefixes of the whole."""
        if _GENERATION.search(self.source):
            return self._jinja(tokenizer, messages, tools, False, True)
        text = self.render(tokenizer, messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(tokenizer, messages[:index], tools, add_generation_prompt=True) if index else ""
            until = self.render(tokenizer, messages[: index + 1], tools) if index + 1 < len(messages) else text
            start = len(prompt)
            if not text.startswith(prompt):  # it opens an answer with what a finished one lacks, such as <think>
                start = len(commonprefix([prompt, text]))
                if start < len(commonprefix([prompt, self.render(tokenizer, messages[:index], tools)])):
                    raise _rewritten(index)
            end = len(until) if text.startswith(until) else self._end(text, start, until, message, index)
            stop = text[:end].rstrip()  # the newline after an end-of-turn token is no part of the answer
            spans.append((start, len(stop) if stop.endswith(tuple(tokenizer.all_special_tokens)) else end))
        return text, spans

    @staticmethod
    def _end(text: str, start: int, until: str, message: Message, index: int) -> int:
        """Where the turn ends in a template that renders the last turn unlike earlier ones (reasoning left out)."""
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        close = until[until.rfind(content) + len(content) :]
        at = text.find(content + close, start)
        if not content or at < 0:
            raise _rewritten(index)
        return at + len(content) + len(close)

    def _jinja(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, prompt: bool, mark: bool
               ) -> tuple[str, list[Span]]:  # fmt: skip
        special: dict[str, Any] = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens_map}
        if self.name in NAMED and not adds_bos(tokenizer):
            special["bos_token"] = ""
        out: Any = render_jinja_template([messages], tools, chat_template=self.source, add_generation_prompt=prompt,
                                         return_assistant_tokens_mask=mark, **special)  # fmt: skip
        return out[0][0], out[1][0] if mark else []


def _rewritten(index: int) -> TemplateError:
    return TemplateError(
        f"the template rewrites messages[{index}] once more messages follow, so its tokens cannot be told apart; "
        "mark the answers with {% generation %} in a Jinja file, or set train_on: all"
    )


def resolve(template: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template called ``template``: ``chat``, ``human-assistant``, ``alpaca`` or a Jinja file.

    None takes the tokenizer's chat template, and ``human-assistant`` where it has none (a base model)."""
    name = str(template) if template is not None else "chat" if tokenizer.chat_template else "human-assistant"
    if name == "chat":
        if not tokenizer.chat_template:
            raise DeltatuneError(
                "template: the tokenizer has no chat template (a base model); set template to human-assistant, "
                "alpaca or a Jinja file, or leave it out to take human-assistant"
            )
        return Template(name, tokenizer.get_chat_template())
    if name in NAMED:
        return Template(name, NAMED[name])
    path = Path(name).expanduser()
    if not path.is_file():
        known = ["chat", *NAMED]
        raise DeltatuneError(f"template: {name!r} is neither {', '.join(known)} nor a Jinja file{nearest(name, known)}")
    return Template(name, path.read_text(encoding="utf-8"))


def tokenise(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    train_on: TrainOn = "response",
    chunk: int = 512,
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each conversation, and for each token whether it is trained.

    The ids before an answer are those that the model is given at generation: where a token of the whole text would
    straddle that border, the text is cut there. Raises `DataError` with the row's origin when it cannot be rendered."""
    rows = iter(conversations)
    while batch := list(islice(rows, chunk)):
        pieces = [_pieces(row, tokenizer, template, train_on) for row in batch]
        wholes = _ids(tokenizer, ["".join(text for text, _ in row) for row in pieces])
        parts = iter(_ids(tokenizer, [text for row in pieces for text, _ in row]))
        for row, whole in zip(pieces, wholes, strict=True):
            yield _join(tokenizer, row, whole, list(islice(parts, len(row))))


Pieces = list[tuple[str, bool]]


def _pieces(row: Conversation, tokenizer: PreTrainedTokenizerBase, template: Template, train_on: TrainOn) -> Pieces:
    """The row's text, cut where training begins or ends."""
    try:
        if train_on == "all":
            return [(template.render(tokenizer, row.messages, row.tools), True)]
        text, spans = template.spans(tokenizer, row.messages, row.tools)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{row.origin}: the template {template.name!r} cannot render this row: {error}") from error
    cuts = [0, *(cut for span in spans for cut in span), len(text)]
    return [(text[a:b], i % 2 == 1) for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)) if b > a]


def _join(tokenizer: PreTrainedTokenizerBase, pieces: Pieces, whole: list[int], parts: list[list[int]]
          ) -> tuple[list[int], list[bool]]:  # fmt: skip
    ids = [token for part in parts for token in part]
    lengths = list(map(len, parts))
    if ids != whole:
        # Pieces may differ from the whole by what a tokenizer puts before any text (SentencePiece's first space).
        texts = [text for text, _ in pieces]
        prefixes = _ids(tokenizer, ["".join(texts[:i]) for i in range(1, len(texts))])
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            ends = [0, *map(len, prefixes), len(whole)]
            ids, lengths = whole, [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return ids, [trained for (_, trained), n in zip(pieces, lengths, strict=True) for _ in range(n)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
