from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizer import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltatune.core.errors import DeltatuneError
from deltatune.data import Conversation, DataError, resolve
from deltatune.data.templates import tokenise

TALK = Conversation(
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of Norway?"},
        {"role": "assistant", "content": "Oslo."},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": "\n\nA lamp, and 猫 too.\n"},
    ],
    origin="f.jsonl:7",
)


def _trained(tokenizer: PreTrainedTokenizerFast, talk: Conversation = TALK, template: str | None = None) -> list[str]:
    """The text of every run of trained tokens."""
    ((ids, mask),) = tokenise([talk], tokenizer, resolve(template, tokenizer))
    runs: list[list[int]] = []
    for i, (token, trained) in enumerate(zip(ids, mask, strict=True)):
        if trained:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_chat_template_trains_answers_and_their_end() -> None:
    tokenizer = tiny_tokenizer()
    assert _trained(tokenizer) == ["Oslo.<|im_end|>", "\n\nA lamp, and 猫 too.\n<|im_end|>"]


def test_tokens_are_those_of_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    talk = Conversation(TALK.messages[:3])
    ((ids, mask),) = tokenise([talk], tokenizer, resolve(None, tokenizer))
    assert ids == tokenizer.apply_chat_template(talk.messages, tokenize=True, return_dict=False)
    assert len(mask) == len(ids) and not mask[-1]  # the newline after the end of turn


@pytest.mark.parametrize("template", ["chat", "human-assistant", "alpaca"])
def test_the_ids_before_an_answer_are_those_of_generation(template: str) -> None:
    tokenizer = tiny_tokenizer()
    chosen = resolve(template, tokenizer)
    ((ids, mask),) = tokenise([TALK], tokenizer, chosen)
    prompt = chosen.render(tokenizer, TALK.messages[:-1], add_generation_prompt=True)
    first = len(mask) - mask[::-1].index(True) - 1
    while mask[first - 1]:
        first -= 1
    rest = chosen.render(tokenizer, TALK.messages).removeprefix(prompt)
    assert ids[:first] == _cut(tokenizer, chosen, prompt)
    assert tokenizer.decode(ids[first:]) == rest


def _cut(tokenizer: PreTrainedTokenizerFast, chosen: object, prompt: str) -> list[int]:
    """The prompt's ids, where the answer inside it was generated from its own prompt."""
    inner = chosen.render(tokenizer, TALK.messages[:2], add_generation_prompt=True)  # type: ignore[attr-defined]
    return [t for part in (inner, prompt[len(inner) :]) for t in tokenizer(part, add_special_tokens=False)["input_ids"]]


def test_a_template_that_marks_its_answers_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert _trained(tiny_tokenizer(), template=str(path)) == ["Oslo.", "\n\nA lamp, and 猫 too.\n"]
    assert resolve(path, tiny_tokenizer()).render(tiny_tokenizer(), TALK.messages).startswith("<s>[system]You are")


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_leaves_reasoning_out_of_earlier_turns() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    assert _trained(tokenizer)[0] == "Oslo.<|im_end|>"
    assert _trained(tokenizer)[1].startswith("<think>")
    tokenizer.chat_template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    assert _trained(tokenizer)[0] == "Oslo.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    expected = r"^f.jsonl:7: the template 'chat' cannot render.*rewrites messages\[2\].*generation"
    with pytest.raises(DataError, match=expected):
        _trained(tokenizer)


def test_a_template_that_raises_names_the_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="f.jsonl:7: .*roles must alternate"):
        _trained(tokenizer)


def test_the_tutorials_template_is_tokenised_as_the_tutorials_do() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    turns = [{"role": "user", "content": "What is\nthe capital?"}, {"role": "assistant", "content": "Oslo is."}]
    assert resolve(None, tokenizer).name == "human-assistant"
    ((ids, mask),) = tokenise([Conversation(turns)], tokenizer, resolve(None, tokenizer))
    prompt = tokenizer("Human: What is\nthe capital?\n\nAssistant: ")["input_ids"]
    answer = tokenizer("Oslo is.</s>")["input_ids"]
    assert ids == prompt + answer and mask == [False] * len(prompt) + [True] * len(answer)
    assert ids != tokenizer("Human: What is\nthe capital?\n\nAssistant: Oslo is.</s>")["input_ids"]


def test_alpaca_keeps_its_input_apart() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    user = {"role": "user", "content": "Sum\n1 2", "instruction": "Sum", "input": "1 2"}
    talk = Conversation([user, {"role": "assistant", "content": "3"}])
    assert resolve("alpaca", tokenizer).render(tokenizer, talk.messages) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSum\n\n### Input:\n1 2\n\n"
        "### Response:\n3</s>"
    )
    assert _trained(tokenizer, talk, "alpaca") == ["3</s>"]


def test_first_space_of_sentencepiece_is_not_doubled() -> None:
    """Pieces on their own would each begin with the tokenizer's space; the whole's tokens are kept."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "[": 3, "]": 4, **{c: 5 + i for i, c in enumerate("abcdeuhi")}}
    vocab |= {"▁h": 20, "▁hi": 21}
    raw = Tokenizer(models.BPE(vocab, [("▁", "h"), ("▁h", "i")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    talk = Conversation([{"role": "user", "content": "abc"}, {"role": "assistant", "content": "hi"}])
    ((ids, mask),) = tokenise([talk], tokenizer, resolve(None, tokenizer))
    assert ids == tokenizer("[abc]hi</s>", add_special_tokens=False)["input_ids"]
    assert [t for t, m in zip(ids, mask, strict=True) if m] == [vocab["h"], vocab["i"], 1]


def test_train_on_all() -> None:
    tokenizer = tiny_tokenizer()
    ((ids, mask),) = tokenise([TALK], tokenizer, resolve(None, tokenizer), "all")
    assert all(mask) and ids == tokenizer.apply_chat_template(TALK.messages, return_dict=False)


def test_which_template() -> None:
    base = tiny_tokenizer(chat=False)
    with pytest.raises(DeltatuneError, match="no chat template.*set template to human-assistant"):
        resolve("chat", base)
    with pytest.raises(DeltatuneError, match="'alpacca' is neither.*did you mean 'alpaca'"):
        resolve("alpacca", base)
    assert resolve(None, tiny_tokenizer()).name == "chat"
