from __future__ import annotations

import pytest
import torch
from test_generate_command import alone
from tiny_tokenizer import tiny_tokenizer

from deltatune.models.loading import load_base

FEW = ["--max-new-tokens", 8]


def test_the_conversation_is_remembered_until_it_is_reset(run, base) -> None:
    result = run("chat", base, *FEW, input="Hello\n\nHello\n/reset\nHello\n/quit\nHello\n")
    assert result.exit_code == 0, result.output
    first, second, note, third = result.stdout.splitlines()
    assert first.strip() == third.strip() == alone(base, None, "Hello")
    assert note == "conversation forgotten"
    tokenizer, model = tiny_tokenizer(), load_base(base)
    heard = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "Hello"},
    ]
    ids = tokenizer.apply_chat_template(heard, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert second.strip() == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_adapters_are_switched(run, base, law, style) -> None:
    lines = "Hello\n/adapter style\n/reset\nHello\n/base\n/reset\nHello\n/adapter lew\n/nope\n/help\n"
    result = run("chat", base, "--adapter", law, "--adapter", style, *FEW, input=lines)
    assert result.exit_code == 0, result.output
    out = result.stdout.splitlines()
    assert out[0].strip() == alone(base, law, "Hello")
    assert out[1] == "answering as style" and out[3].strip() == alone(base, style, "Hello")
    assert out[4] == "answering as the base" and out[6].strip() == alone(base, None, "Hello")
    assert "no adapter is called 'lew'; did you mean 'law'?" in out[7]
    assert out[8].startswith("no command /nope") and any(line.startswith("/reset ") for line in out[9:])


def test_base_and_adapters_one_above_the_other(run, base, law) -> None:
    result = run("chat", "--adapter", law, "--compare", *FEW, input="Hello\nHello\n")
    assert result.exit_code == 0, result.output
    out = result.stdout.splitlines()
    assert out[:4:2] == ["── base", "── law"] == out[4::2]
    assert out[1].strip() == alone(base, None, "Hello") and out[3].strip() == alone(base, law, "Hello")


def test_comparing_needs_an_adapter(run, base) -> None:
    result = run("chat", base, "--compare", input="Hello\n")
    assert result.exit_code == 1 and "--compare needs an --adapter" in result.stderr


def test_the_adapters_own_template_is_used(run, base, law) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(law)
    changed = run("chat", base, "--adapter", law, *FEW, input="Hello\n").stdout.strip()
    assert changed != alone(base, law, "Hello")
    tokenizer.save_pretrained(base)
    assert changed == alone(base, law, "Hello")


def test_an_interrupted_answer_is_not_the_end(run, base, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltatune.cli.session import Session

    answer, calls = Session.answer, []

    def once(self, *args):  # type: ignore[no-untyped-def]
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return answer(self, *args)

    monkeypatch.setattr(Session, "answer", once)
    result = run("chat", base, *FEW, input="Hello\nHello\n")
    assert result.exit_code == 0 and result.stdout.strip() == alone(base, None, "Hello")
