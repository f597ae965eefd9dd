from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_generate_command import alone, rows

from deltatune.core import load, using
from deltatune.data import resolve
from deltatune.models.loading import load_base, load_tokenizer

NEW = 8


def told(base: Path, small: Path, adapter: Path, prompt: str, alpha: float, expert: str | None = None) -> str:
    """Greedy decoding of the mixed logits as a loop, without a cache; `expert` is its prompt if it has its own."""
    model, little, tokenizer = load_base(base), load_base(small), load_tokenizer(base)
    load(little, adapter, "it")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    own, other = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, expert or text))
    new: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(input_ids=torch.tensor([own + new])).logits[0, -1]
            with using(little, "it"):
                plus = little(input_ids=torch.tensor([other + new])).logits[0, -1]
            with using(little):
                minus = little(input_ids=torch.tensor([own + new])).logits[0, -1]
            token = int((logits + alpha * (plus - minus)).argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.fixture
def small(make_base) -> Path:
    return make_base("gpt2")


@pytest.fixture
def chatty(small, save) -> Path:
    return save(small, "chatty", says=True)


def test_a_base_answers_by_proxy(run, base, small, chatty, tmp_path) -> None:
    asked = ["Hello", "What is the capital of Norway?", "Why"]
    args = ["generate", base, *(x for p in asked for x in ("--prompt", p)), "--max-new-tokens", NEW, "--json"]
    got = rows(run(*args, "--proxy", small, "--proxy-adapter", chatty))
    want = [told(base, small, chatty, p, 1.0) for p in asked]
    assert [row["response"] for row in got] == want and want != [alone(base, None, p) for p in asked]
    assert rows(run(*args, "--proxy-adapter", f"it={chatty}")) == got  # the adapter says which base is its own
    half = rows(run(*args, "--proxy-adapter", chatty, "--alpha", 0.5))
    assert [row["response"] for row in half] == [told(base, small, chatty, p, 0.5) for p in asked] != want
    assert rows(run(*args, "--proxy-adapter", chatty, "--alpha", 0)) == rows(run(*args))


def test_the_expert_is_asked_in_its_own_template(run, base, small, chatty) -> None:
    (chatty / "chat_template.jinja").write_text("{% for m in messages %}{{ 'Human: ' + m.content + ' ' }}{% endfor %}")
    args = ["generate", base, "--prompt", "Hello", "--max-new-tokens", NEW, "--json", "--proxy-adapter", chatty]
    own = told(base, small, chatty, "Hello", 1.0, "Human: Hello ")
    assert rows(run(*args))[0]["response"] == own != told(base, small, chatty, "Hello", 1.0)
    asked, tokenizer = [{"role": "user", "content": "Hello"}], load_tokenizer(base)
    classic = resolve("human-assistant", tokenizer).render(tokenizer, asked, add_generation_prompt=True)
    named = rows(run(*args, "--proxy-template", "human-assistant"))[0]["response"]
    assert named == told(base, small, chatty, "Hello", 1.0, classic)


def test_answers_end_where_the_experts_do(run, base, small, chatty) -> None:
    """The expert's end of turn may be an ordinary token to the base."""
    [row] = rows(
        run("generate", base, "--prompt", "Hello", "--max-new-tokens", NEW, "--json", "--proxy-adapter", chatty)
    )
    ids = load_tokenizer(base)(row["response"], add_special_tokens=False)["input_ids"]
    config = json.loads((small / "generation_config.json").read_text())
    (small / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [2, ids[3]]}))
    [short] = rows(
        run("generate", base, "--prompt", "Hello", "--max-new-tokens", NEW, "--json", "--proxy-adapter", chatty)
    )
    assert row["response"].startswith(short["response"]) and len(short["response"]) < len(row["response"])


def test_chat_by_proxy_beside_an_adapter_of_the_base(run, base, small, chatty, law) -> None:
    more = ["--proxy-adapter", chatty, "--max-new-tokens", NEW]
    result = run("chat", base, *more, input="Hello\n")
    assert result.exit_code == 0 and result.stdout.strip() == told(base, small, chatty, "Hello", 1.0)
    both = run("generate", base, "--prompt", "Hello", "--adapter", law, *more)
    assert both.exit_code == 0 and both.stdout.strip() not in (result.stdout.strip(), alone(base, law, "Hello"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--proxy", "small"], "--proxy needs --proxy-adapter"),
        (["--alpha", "2"], "--alpha needs --proxy-adapter"),
        (["--proxy-adapter", "nowhere"], "nowhere: no adapter_config.json there"),
        (["--proxy-adapter", "chatty", "--alpha", "inf"], "alpha = inf is not a finite number"),
        (["--proxy-adapter", "chatty", "--proxy", "t5"], "T5ForConditionalGeneration has no module"),
    ],
)
def test_wrong_options(run, base, small, chatty, make_base, args, message) -> None:
    names = {"chatty": chatty, "small": small} | ({"t5": make_base("t5")} if "t5" in args else {})
    result = run("generate", base, "--prompt", "a", *(names.get(a, a) for a in args))
    assert result.exit_code == 1 and message in result.stderr.replace("\n", " ")


def test_a_small_base_of_another_vocabulary(run, base, small, chatty) -> None:
    saved = json.loads((small / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    one, two = list(vocabulary)[20:22]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (small / "tokenizer.json").write_text(json.dumps(saved))
    result = run("generate", base, "--prompt", "a", "--proxy-adapter", chatty)
    assert result.exit_code == 1 and "the tokenizers differ in 2 tokens" in result.stderr
