"""T1..T5 of proxy-tuning against three separate full forwards, one row at a time, without padding or cache."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import deltatune as dt
from deltatune.models.tiny import tiny
from deltatune.serve import ProxyTuning

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
PROMPTS = [[7, 8, 9, 10, 11], [12, 13, 14], [15, 9, 16, 17, 18, 19]]
CHATTY = [[5, 3, 7, 8, 9, 10, 11, 4], [5, 3, 12, 13, 14, 4, 20], [5, 3, 15, 9]]
NEW = 5
Rows = list[list[int]]


def lm(family: str, seed: int, vocabulary: int = V) -> Any:
    torch.manual_seed(seed)
    model = tiny(family, vocab_size=vocabulary)
    model.generation_config.eos_token_id = None
    return model


def tuned(model: Any, method: Any = None, size: float = 0.3) -> Any:
    torch.manual_seed(3)
    adapter = dt.attach(model, method or dt.LoRA(r=4), "chat")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * size)
    dt.activate(model)
    return model


def proxy(base: Any, small: Any, alpha: float = 1.0) -> ProxyTuning:
    return ProxyTuning(base, small, "chat", TOKENIZER, TOKENIZER, alpha)


def padded(rows: Rows) -> dict[str, torch.Tensor]:
    n = max(map(len, rows))
    ids = torch.tensor([[0] * (n - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (n - len(r)) + [1] * len(r) for r in rows])}


@torch.no_grad()
def last(model: Any, ids: list[int], *names: str) -> torch.Tensor:
    """The logits after `ids`, from one forward of one row without a cache."""
    if not dt.adapters(model):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    with dt.using(model, *names):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def three(base: Any, small: Any, prompt: list[int], expert: list[int], told: list[int]) -> list[torch.Tensor]:
    """l_M, l_M+ and l_M- after the prompts and the tokens `told`."""
    return [last(base, prompt + told), last(small, expert + told, "chat"), last(small, prompt + told)]


def by_hand(
    base: Any, small: Any, alpha: float, prompt: list[int], expert: list[int]
) -> tuple[list[int], torch.Tensor]:
    told: list[int] = []
    logits = []
    for _ in range(NEW):
        m, plus, minus = three(base, small, prompt, expert, told)
        mixed = m.clone()
        n = min(len(m), len(plus))
        mixed[:n] += alpha * (plus[:n] - minus[:n])
        logits.append(mixed)
        told.append(int(mixed.argmax()))
    return told, torch.stack(logits)


def answers(made: ProxyTuning, prompts: Rows = PROMPTS, expert: Rows | None = None, **options: Any) -> tuple[Any, Any]:
    """(new tokens, mixed logits (b, NEW, V))."""
    given = padded(prompts)
    how = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True} | options
    out = made.generate(**given, expert=None if expert is None else padded(expert), **how)
    return out.sequences[:, given["input_ids"].shape[1] :].tolist(), torch.stack(out.logits, 1)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("expert", [None, CHATTY], ids=["same prompt", "own prompt"])
@pytest.mark.parametrize("families", ["llama gpt2", "gpt2 llama", "bloom opt", "opt bloom"])
def test_a_padded_batch_is_three_full_forwards_a_row(families: str, expert: Rows | None, cached: bool) -> None:
    one, two = families.split()
    base, small = lm(one, 0), tuned(lm(two, 1))
    tokens, logits = answers(proxy(base, small, 0.7), PROMPTS, expert, use_cache=cached)
    for i, (p, e) in enumerate(zip(PROMPTS, expert or PROMPTS, strict=True)):
        told, want = by_hand(base, small, 0.7, p, e)
        near(logits[i], want)
        assert tokens[i] == told
    assert not torch.allclose(logits[0, 0], last(base, PROMPTS[0]), atol=1e-2)


@pytest.mark.parametrize(
    "method",
    [dt.PromptTuning(length=3), dt.PrefixTuning(length=3), dt.Houlsby(size=4), dt.IA3()],
    ids=lambda m: type(m).__name__,
)
def test_any_method_makes_an_expert(method: Any) -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1), method)
    tokens, logits = answers(proxy(base, small), PROMPTS, CHATTY)
    for i, (p, e) in enumerate(zip(PROMPTS, CHATTY, strict=True)):
        told, want = by_hand(base, small, 1.0, p, e)
        near(logits[i], want, 5e-5)
        assert tokens[i] == told


def test_t1_without_alpha_the_base_answers() -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1))
    given = padded(PROMPTS)
    alone = base.generate(**given, do_sample=False, max_new_tokens=NEW)
    assert answers(proxy(base, small, 0.0))[0] == alone[:, given["input_ids"].shape[1] :].tolist()


def test_t2_an_expert_that_learned_nothing_leaves_the_base() -> None:
    base, small = lm("llama", 0), lm("gpt2", 1)
    dt.attach(small, dt.LoRA(r=4), "chat")
    tokens, logits = answers(proxy(base, small, 3.0))
    for i, prompt in enumerate(PROMPTS):
        near(logits[i, 0], last(base, prompt))
    assert tokens == answers(proxy(base, small, 0.0))[0]


def test_t3_a_base_that_is_the_anti_expert_becomes_the_expert() -> None:
    base, small = lm("gpt2", 1), tuned(lm("gpt2", 1))
    _, logits = answers(proxy(base, small))
    for i, prompt in enumerate(PROMPTS):
        near(logits[i, 0], last(small, prompt, "chat"))
    one = tuned(copy.deepcopy(base))  # and so does one model in both places
    near(answers(proxy(one, one))[1], logits)


def test_t4_probabilities_are_the_product_of_the_papers_form() -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1))
    alpha = 1.6
    tokens, logits = answers(proxy(base, small, alpha))
    for i, prompt in enumerate(PROMPTS):
        for t in range(NEW):
            m, plus, minus = (F.softmax(x.double(), -1) for x in three(base, small, prompt, prompt, tokens[i][:t]))
            product = m * (plus / minus) ** alpha
            near(F.softmax(logits[i, t].double(), -1), product / product.sum(), 1e-4)


@pytest.mark.parametrize("who", ["base", "expert", "anti-expert"])
def test_t5_a_constant_added_to_any_logits_changes_nothing(who: str) -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1))
    tokens, logits = answers(proxy(base, small))
    rows = {"base": slice(None), "expert": slice(3), "anti-expert": slice(3, None)}[who]

    def shift(module: Any, args: Any, out: Any) -> None:
        out.logits[rows] += 2.5

    (base if who == "base" else small).register_forward_hook(shift)
    again, moved = answers(proxy(base, small))
    assert again == tokens and float((moved - logits).abs().min()) > 1
    near(F.softmax(moved, -1), F.softmax(logits, -1), 1e-4)


def test_penalties_temperature_and_top_p_act_on_the_mixed_logits() -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1))
    how = {"do_sample": True, "temperature": 1.7, "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.4}
    torch.manual_seed(5)
    given = padded(PROMPTS[:1])
    out = proxy(base, small).generate(
        **given, max_new_tokens=NEW, **how, output_scores=True, return_dict_in_generate=True
    )
    process = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(1.7), TopPLogitsWarper(0.8)]
    )
    torch.manual_seed(5)
    told: list[int] = []
    for t in range(NEW):
        m, plus, minus = three(base, small, PROMPTS[0], PROMPTS[0], told)
        scores = process(torch.tensor([PROMPTS[0] + told]), (m + plus - minus)[None])
        kept = out.scores[t].isfinite()
        assert torch.equal(kept, scores.isfinite()) and 1 < int(kept.sum()) < V
        near(out.scores[t][kept], scores[kept], 1e-4)
        told.append(int(torch.multinomial(F.softmax(scores, -1), 1)))
    assert out.sequences[0, len(PROMPTS[0]) :].tolist() == told


def test_several_answers_to_each_prompt() -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1))
    torch.manual_seed(0)
    tokens, logits = answers(proxy(base, small), PROMPTS, CHATTY, do_sample=True, num_return_sequences=2, top_k=0)
    for i, told in enumerate(tokens):
        m, plus, minus = three(base, small, PROMPTS[i // 2], CHATTY[i // 2], told[:-1])
        near(logits[i, -1], m + plus - minus)
    assert len({tuple(t) for t in tokens}) == 6


@pytest.mark.parametrize("more", [9, 0], ids=["the small model has more tokens", "equal"])
def test_what_the_expert_has_beyond_the_vocabulary_is_cut(more: int) -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1, V + more))
    chat = tiny_tokenizer()
    if more:
        chat.add_tokens([f"<more {i}>" for i in range(more)])
    tokens, logits = answers(ProxyTuning(base, small, "chat", TOKENIZER, chat))
    told, want = by_hand(base, small, 1.0, PROMPTS[0], PROMPTS[0])
    near(logits[0], want)
    assert tokens[0] == told and logits.shape[-1] == V


def test_rows_of_the_base_beyond_both_tokenizers_are_left_as_they_are() -> None:
    base, small = lm("llama", 0, V + 12), tuned(lm("gpt2", 1))
    _, logits = answers(proxy(base, small))
    near(logits[0], by_hand(base, small, 1.0, PROMPTS[0], PROMPTS[0])[1])
    near(logits[0, 0, V:], last(base, PROMPTS[0])[V:])


def test_the_base_may_have_adapters_of_its_own_and_is_left_as_it_was() -> None:
    base, small = tuned(lm("llama", 0), dt.LoRA(r=2)), tuned(lm("gpt2", 1))
    with dt.using(base, "chat"):
        _, logits = answers(proxy(base, small))
    m = last(base, PROMPTS[0], "chat")
    near(logits[0, 0], m + last(small, PROMPTS[0], "chat") - last(small, PROMPTS[0]))
    seen = []

    def elsewhere(module: Any, args: Any) -> None:  # while the base answers, another thread calls it
        if not seen:
            seen.append(None)
            thread = Thread(target=lambda: seen.append(last(base, PROMPTS[0])))
            thread.start()
            thread.join()

    base.register_forward_pre_hook(elsewhere)
    answers(proxy(base, small))
    near(seen[1], last(base, PROMPTS[0]))


def test_what_does_not_fit_is_refused() -> None:
    base, small = lm("llama", 0), tuned(lm("gpt2", 1))
    made = proxy(base, small)
    given = padded(PROMPTS)

    def says(text: str, call: Any) -> None:
        with pytest.raises(dt.DeltatuneError, match=text):
            call()

    says("num_beams = 2 is not supported", lambda: made.generate(**given, num_beams=2))
    says("prefill_chunk_size = 4", lambda: made.generate(**given, prefill_chunk_size=4))
    says("guidance_scale = 2", lambda: made.generate(**given, guidance_scale=2))
    says("1 prompts of the expert for 3", lambda: made.generate(**given, expert=padded(PROMPTS[:1])))
    right = given | {"attention_mask": given["attention_mask"].flip(1)}
    says("pad them on the left", lambda: made.generate(**right))
    says("no adapter 'chet'; did you mean 'chat'", lambda: ProxyTuning(base, small, "chet", TOKENIZER, TOKENIZER))
    says("no adapter 'chat'; attached: none", lambda: proxy(base, lm("gpt2", 1)))
    says("is not a finite number", lambda: proxy(base, small, float("nan")))
    says("BertForMaskedLM is without a language", lambda: proxy(base, tuned(tiny("bert", vocab_size=V))))
    says("is an encoder-decoder", lambda: proxy(tiny("t5", vocab_size=V), small))
    says("embeds 390 tokens", lambda: proxy(base, tuned(lm("gpt2", 1, 390))))
    swapped, more = tiny_tokenizer(), tiny_tokenizer()
    vocabulary = swapped.get_vocab()
    names = {i: t for t, i in vocabulary.items()}
    vocabulary[names[9]], vocabulary[names[8]] = 8, 9
    swapped.get_vocab = lambda: vocabulary  # type: ignore[method-assign]
    says(
        "differ in 2 tokens: .* is 8 in the base's and 9", lambda: ProxyTuning(base, small, "chat", TOKENIZER, swapped)
    )
    more.add_tokens(["<more>"])
    says(r"'<more>' is \d+ in the base's and missing", lambda: ProxyTuning(base, small, "chat", more, TOKENIZER))
