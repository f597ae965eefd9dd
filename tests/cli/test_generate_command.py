from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltatune.core import activate, load
from deltatune.models.loading import load_base, load_tokenizer


def alone(base: Path, adapter: Path | None, prompt: str, new: int = 8) -> str:
    """Greedy decoding written as a loop, one prompt at a time, without a cache."""
    model, tokenizer = load_base(base), load_tokenizer(base)
    if adapter is not None:
        load(model, adapter, "it")
        activate(model, "it")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new):
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            if int(token) == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token.view(1, 1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def rows(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_prompt_under_an_adapter_that_names_its_base(run, base, law) -> None:
    [row] = rows(run("generate", "--adapter", law, "--prompt", "Hello", "--max-new-tokens", 8, "--json"))
    assert row == {"prompt": "Hello", "adapter": "law", "response": alone(base, law, "Hello")}
    assert row["response"] != alone(base, None, "Hello")
    plain = run("generate", "--adapter", law, "--prompt", "Hello", "--max-new-tokens", 8)
    assert plain.stdout == row["response"] + "\n"


def test_each_row_of_a_file_under_its_own_adapter_in_one_batch(run, base, law, style, tmp_path) -> None:
    asked = [
        ("Hello", "law"),
        ("The quick brown fox jumps over", "s"),
        ("What is the capital of Norway?", None),
        ("Why", "law"),
    ]
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"id": i, "prompt": p, "adapter": a}) + "\n" for i, (p, a) in enumerate(asked)))
    args = ["generate", base, "--adapter", law, "--adapter", f"s={style}", "--file", file, "--max-new-tokens", 8]
    got = rows(run(*args, "--json"))
    folders = {"law": law, "s": style, None: None}
    want = [alone(base, folders[a], p) for p, a in asked]
    assert [row["response"] for row in got] == want and len(set(want)) == 4
    assert [(row["id"], row["prompt"], row["adapter"]) for row in got] == [(i, *pair) for i, pair in enumerate(asked)]
    result = run(*args, "--output", out, "--batch-size", 3)
    assert result.exit_code == 0 and "4 answers" in result.stdout
    assert [json.loads(line) for line in out.read_text().splitlines()] == got
    shown = run(*args)
    assert "── s: The quick brown fox" in shown.stdout and "── base: What is" in shown.stdout


def test_drawing_follows_the_seed(run, base) -> None:
    def draw(*options: object) -> str:
        result = run("generate", base, "--prompt", "Hello", "--max-new-tokens", 8, *options)
        assert result.exit_code == 0, result.output
        return result.stdout

    hot = ["--temperature", 1.5, "--top-p", 0.9]
    assert draw(*hot, "--seed", 1) == draw(*hot, "--seed", 1) != draw(*hot, "--seed", 2)
    assert draw("--seed", 1) == draw("--seed", 2)


def test_bad_rows_are_reported_together(run, base, law, tmp_path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n{"messages": ["c"]}\n')
    result = run("generate", base, "--file", file)
    assert result.exit_code == 1
    assert "p.jsonl:2: field 'prompt'" in result.stderr and "p.jsonl:3: field 'prompt'" in result.stderr
    file.write_text('{"prompt": "a", "adapter": "lew"}\n{"prompt": "b", "adapter": "law"}\n')
    result = run("generate", base, "--adapter", law, "--file", file)
    assert result.exit_code == 1
    assert result.stderr == f"error: {file}:1: no adapter is called 'lew'; did you mean 'law'?\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--prompt", "a", "--file", "b"], 2, "either --prompt or --file"),
        ([], 2, "either --prompt or --file"),
        (["--prompt", "a", "--adapter", "nowhere"], 1, "nowhere: no adapter_config.json there"),
        (["--prompt", "a", "--template", "alpacca"], 1, "did you mean 'alpaca'"),
        (["--prompt", "a", "--dtype", "float"], 1, "is not auto, float32"),
        (["--prompt", "a", "--output", "nowhere/x.jsonl"], 1, "there is no folder nowhere"),
    ],
)
def test_wrong_options(run, base, args, code, message) -> None:
    result = run("generate", base, *args)
    assert result.exit_code == code and message in result.stderr.replace("\n", " ")


def test_a_base_must_be_named_somewhere(run, base, style) -> None:
    assert "base: name one, or 'default'" in run("generate", "--prompt", "a").stderr
    result = run("generate", "--adapter", style, "--prompt", "a")
    assert result.exit_code == 1 and "does not say which base it was trained on" in result.stderr


def test_two_adapters_of_one_name(run, base, law, style, tmp_path) -> None:
    (style.parent.parent / "more").mkdir()
    other = style.rename(style.parent.parent / "more" / "law")
    result = run("generate", base, "--adapter", law, "--adapter", other, "--prompt", "a")
    assert result.exit_code == 1 and "tell them apart with NAME=DIR" in result.stderr


def test_a_tokenizer_of_another_model(run, base) -> None:
    from tiny_tokenizer import tiny_tokenizer

    large = tiny_tokenizer()
    large.add_tokens(["<one>", "<more>"])
    large.save_pretrained(base)
    result = run("generate", base, "--prompt", "a")
    assert result.exit_code == 1 and "do not belong together" in result.stderr


def test_named_templates_and_the_system_prompt(run, base, tmp_path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role + '=' + m.content + ' ' }}{% endfor %}")
    args = ["generate", base, "--prompt", "Hello", "--max-new-tokens", 8]
    answers = {
        run(*args, *more).stdout
        for more in ([], ["--template", template], ["--system", "Be brief."], ["--template", "alpaca"])
    }
    assert len(answers) == 4


def test_an_encoder_decoder(run, make_base) -> None:
    t5 = make_base("t5")
    [row] = rows(run("generate", t5, "--prompt", "Hello", "--max-new-tokens", 4, "--json"))
    assert row["adapter"] is None and isinstance(row["response"], str)
