"""Prompt tuning: the prompt is what as many real tokens would be, and nobody above the backbone learns of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from prefixed import padded

import deltatune as dt
from deltatune.methods.prompt import PromptTuning
from deltatune.models.tiny import PAD, inputs, tiny

CAUSAL = (
    "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "bloom",
    "falcon", "falcon-new",
)  # fmt: skip
CLASSIFIERS = ("bert", "roberta", "deberta-v2", "distilbert")
SEQ2SEQ = ("t5", "mt5", "bart")
TEXT = (11, 42, 7)


def build(family, task="lm", **overrides):
    torch.manual_seed(0)
    window = {"sliding_window": 4} if family in ("mistral", "gemma2", "gemma3") else {}  # shorter than the inputs
    return tiny(family, task, **window, **overrides)


def text(length=3, seed=5):
    return tuple(torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def with_text(family, ids, ids_of_text):
    """The same input, written out."""
    more, at = torch.tensor([ids_of_text]).expand(len(ids), -1), int(family in CLASSIFIERS)
    return torch.cat([ids[:, :at], more, ids[:, at:]], 1)


def of_tokens(family, logits, p):
    if family in SEQ2SEQ:
        return logits
    at = int(family in CLASSIFIERS)
    return torch.cat([logits[:, :at], logits[:, at + p :]], 1)


@pytest.mark.parametrize("family", (*CAUSAL, *CLASSIFIERS, *SEQ2SEQ))
@torch.no_grad()
def test_a_prompt_of_real_embeddings_is_the_real_text(family):
    model = build(family)
    given = inputs(model, length=7)
    full = with_text(family, given["input_ids"], TEXT)
    want = of_tokens(family, model(**{**given, "input_ids": full, "attention_mask": torch.ones_like(full)}).logits, 3)
    alone = model(**given).logits
    dt.attach(model, PromptTuning(length=3, init=TEXT))
    near(model(**given).logits, want)
    without = {k: v for k, v in given.items() if k != "attention_mask"}
    near(model(**without).logits, want)
    embeds = model.get_input_embeddings()(given["input_ids"])
    if family not in SEQ2SEQ:
        near(model(**{k: v for k, v in given.items() if k != "input_ids"}, inputs_embeds=embeds).logits, want)
    assert (want - alone).abs().max() > 1e-2
    dt.activate(model)
    assert torch.equal(model(**given).logits, alone)
    dt.detach(model)
    assert torch.equal(model(**given).logits, alone)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", (*CAUSAL, "bert", "roberta", "distilbert", "t5", "mt5"))
@torch.no_grad()
def test_padding_on_either_side_changes_no_real_token(family, side):
    model = build(family)
    dt.attach(model, PromptTuning(length=3))
    batch, rows, starts = padded(side)
    extra = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family in SEQ2SEQ else {}
    got = model(**batch, **{k: v.expand(len(rows), -1) for k, v in extra.items()}).logits
    for i, row in enumerate(rows):
        want = model(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **extra).logits[0]
        part = got[i] if family in SEQ2SEQ else got[i, starts[i] : starts[i] + len(row)]
        near(part, want)


@pytest.mark.parametrize("family", ("gpt2", "opt", "llama"))
@torch.no_grad()
def test_given_positions_count_on_after_the_prompt(family):
    model = build(family)
    given = inputs(model, length=6)
    dt.attach(model, PromptTuning(length=3))
    want = model(**given).logits
    own = torch.arange(6)[None]
    near(model(**given, position_ids=own).logits, want)
    near(model(input_ids=given["input_ids"], position_ids=own).logits, want)
    batch, *_ = padded("left")
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = batch["attention_mask"].bool()
    near(model(**batch, position_ids=counted).logits[real], model(**batch).logits[real])


GENERATE = ("llama", "gemma2", "mistral", "gpt2", "gptj", "opt", "bloom", "falcon", "t5", "bart")


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None, **options)


@pytest.mark.parametrize("family", GENERATE)
@torch.no_grad()
def test_generation_with_and_without_a_cache_is_that_of_the_real_text(family):
    model = build(family)
    batch, rows, _ = padded("left" if family != "bart" else "right")
    want = []
    for row in rows:
        full = torch.cat([torch.tensor(TEXT), row])[None]
        out = generate(model, {"input_ids": full, "attention_mask": torch.ones_like(full)})[0]
        want.append(out if family in SEQ2SEQ else out[full.shape[1] :])
    dt.attach(model, PromptTuning(length=3, init=TEXT))
    chunks = {} if family in SEQ2SEQ else {"prefill_chunk_size": 5}
    for options in ({}, {"use_cache": False}, chunks):
        got = generate(model, batch, **options)[:, 0 if family in SEQ2SEQ else batch["input_ids"].shape[1] :]
        assert torch.equal(got, torch.stack(want)), options
    two = generate(model, batch, num_beams=2)
    assert torch.equal(two, generate(model, batch, num_beams=2, use_cache=False))


def three(model):
    dt.attach(model, PromptTuning(length=3, init=text(3, 1)), "short")
    dt.attach(model, PromptTuning(length=5, init=text(5, 2)), "long")
    return ["short", None, "long"]


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", (*CAUSAL, *CLASSIFIERS, *SEQ2SEQ))
@torch.no_grad()
def test_rows_with_prompts_of_different_lengths_equal_separate_runs(family, side):
    model = build(family)
    names = three(model)
    batch, rows, starts = padded(side if family not in ("bart", "deberta-v2") else "right")
    starts = starts if family not in ("bart", "deberta-v2") else [0] * 3
    extra = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family in SEQ2SEQ else {}
    with dt.using(model, router=dt.PerRow(names)):
        got = model(**batch, **{k: v.expand(3, -1) for k, v in extra.items()}).logits
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        with dt.using(model, *([name] if name else [])):
            want = model(input_ids=row[None], attention_mask=torch.ones(1, len(row)), **extra).logits[0]
        part = got[i] if family in SEQ2SEQ else got[i, starts[i] : starts[i] + len(row)]
        near(part, want)


@pytest.mark.parametrize("family", GENERATE)
@torch.no_grad()
def test_rows_with_different_prompts_generate_as_alone(family):
    model = build(family)
    names = three(model)
    batch, rows, _ = padded("left" if family != "bart" else "right")
    n = 0 if family in SEQ2SEQ else batch["input_ids"].shape[1]
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        with dt.using(model, router=dt.PerRow(names)):
            got = generate(model, batch, **options)[:, n:]
        for i, (row, name) in enumerate(zip(rows, names, strict=True)):
            one = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            with dt.using(model, *([name] if name else [])):
                assert torch.equal(got[i], generate(model, one, **options)[0, len(row) if n else 0 :]), (name, options)


def test_rows_without_masks_may_differ_too():
    model = build("llama")
    names = three(model)
    ids = inputs(model, batch=3)["input_ids"]
    with torch.no_grad(), dt.using(model, router=dt.PerRow(names)):
        near(model(input_ids=ids).logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
@torch.no_grad()
def test_stacked_prompts_stand_one_after_the_other(family):
    model, (a, b) = build(family), (text(2, 1), text(4, 2))
    given = inputs(model)
    dt.attach(model, PromptTuning(length=6, init=a + b), "both")
    want = model(**given).logits
    dt.attach(model, PromptTuning(length=2, init=a), "a")
    dt.attach(model, PromptTuning(length=4, init=b), "b")
    dt.activate(model, "a", "b")  # the first is innermost
    near(model(**given).logits, want)
    if family == "llama":
        near(generate(model, given).float(), generate(model, given, use_cache=False).float())


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "opt"))
@torch.no_grad()
def test_classification_reads_the_last_token_of_the_text(family):
    model = build(family, "classification")
    batch, rows, _ = padded("right")
    want = []
    for row in rows:
        full = torch.cat([torch.tensor(TEXT), row])[None]
        want.append(model(input_ids=full, attention_mask=torch.ones_like(full)).logits[0])
    dt.attach(model, PromptTuning(length=3, init=TEXT))
    near(model(**batch).logits, torch.stack(want))


@pytest.mark.parametrize("family", (*CLASSIFIERS, "t5", "bart"))
@torch.no_grad()
def test_heads_that_pool_an_encoder_read_what_they_read_in_the_text(family):
    model = build(family, "classification")
    ids = inputs(model, length=8)["input_ids"]
    full = with_text(family, ids, TEXT)
    extra = {"decoder_input_ids": ids} if family in SEQ2SEQ else {}  # else made of the encoder's ids
    want = model(input_ids=full).logits if family not in SEQ2SEQ else None
    dt.attach(model, PromptTuning(length=3, init=TEXT))
    got = model(input_ids=ids, **extra).logits
    assert got.shape == (2, 3)
    if want is not None:
        near(got, want)
    if family != "bart":
        tokens = build(family, "tokens")
        want = tokens(input_ids=full).logits
        want = want[:, 3:] if family == "t5" else of_tokens(family, want, 3)
        dt.attach(tokens, PromptTuning(length=3, init=TEXT))
        near(tokens(input_ids=ids).logits, want)


@torch.no_grad()
def test_token_types_reach_the_tokens_they_were_given_to():
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, -1)
    for family in ("bert", "gpt2"):
        model = build(family)
        given = inputs(model, length=7)
        full = with_text(family, given["input_ids"], TEXT)
        more = torch.cat([torch.zeros(2, 3, dtype=torch.long), types], 1)
        want = of_tokens(family, model(input_ids=full, token_type_ids=more).logits, 3)
        assert (want - of_tokens(family, model(input_ids=full).logits, 3)).abs().max() > 1e-2
        dt.attach(model, PromptTuning(length=3, init=TEXT))
        near(model(**given, token_type_ids=types).logits, want)


@pytest.mark.parametrize("family", ("llama", "bloom", "bert", "t5"))
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_tokens(family):
    model = build(family, attn_implementation="eager")
    given = inputs(model, length=7)
    dt.attach(model, PromptTuning(length=3))
    out = model(**given, output_hidden_states=True, output_attentions=True)
    states = out.encoder_hidden_states if family == "t5" else out.hidden_states
    assert [tuple(s.shape) for s in states] == [(2, 10 if family == "t5" else 7, 32)] * 3
    if family in ("llama", "bloom"):
        assert tuple(out.attentions[0].shape) == (2, 4, 7, 10)  # a token looks at prompt and tokens
        near(model.lm_head(states[-1]), out.logits)
        first = model(**given, output_hidden_states=True, return_dict=False)
        near(first[0], out.logits)


def test_only_the_prompt_learns_and_the_loss_falls():
    for family in ("bert", "t5", "bart", "llama"):
        model = build(family).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        adapter = dt.attach(model, PromptTuning(length=8), "p")
        (prompt,) = adapter.parameters()
        assert prompt.shape == (8, 32) and prompt.dtype == torch.float32
        given = inputs(model)
        labels = given.get("decoder_input_ids", given["input_ids"]).roll(-1, 1)
        given.pop("decoder_input_ids", None)
        step = torch.optim.Adam(adapter.parameters(), lr=0.1)
        losses = []
        for _ in range(30):
            loss = model(**given, labels=labels).loss
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2, (family, losses)
        dt.detach(model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "bert", "t5", "opt"))
def test_activation_checkpointing_keeps_the_gradient(family, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = build(family).train()
        adapter = dt.attach(model, PromptTuning(length=4, init=text(4)))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs(model), use_cache=False).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
    assert grads[0][0].abs().max() > 0
    near(*grads)


def test_initialisations():
    model = build("gemma")
    table = model.get_input_embeddings()

    def start(**options):
        torch.manual_seed(3)
        (prompt,) = dt.attach(model, PromptTuning(**options), "p").parameters()
        dt.detach(model)
        return prompt.detach()

    rows = table(torch.arange(99)).detach()  # Gemma scales its embeddings: the prompt stands where they go
    drawn = [next(i for i in range(99) if torch.equal(rows[i], r)) for r in start(length=20)]
    assert len(set(drawn)) == 20
    assert len(start(length=120)) == 120
    uniform = start(length=500, init="uniform")
    assert -0.5 <= uniform.min() < -0.45 and 0.45 < uniform.max() <= 0.5
    assert torch.equal(start(length=5, init=(7, 8)), rows[[7, 8, 7, 8, 7]])
    assert torch.equal(start(length=2, init=(7, 8, 9)), rows[[7, 8]])
    labels = start(length=3, init=((7, 8), (9,)))
    near(labels[:2], torch.stack([rows[[7, 8]].mean(0), rows[9]]))
    near(dt.PromptTuning.from_dict(PromptTuning(init=((7, 8), (9,))).to_dict()).init, ((7, 8), (9,)))


@pytest.mark.parametrize("options, message", [
    ({"length": 0}, "length must be at least 1, got 0"), ({"init": "Classify this"}, "token ids, got 'Classify this'"),
    ({"init": ()}, "token ids"), ({"init": (5, 99)}, "token id 99 is not among the 99"),
])  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(dt.DeltatuneError, match=message):
        dt.attach(build("llama"), PromptTuning(**options))


@pytest.mark.parametrize("family", ("vit", "whisper", "clip"))
def test_backbones_without_tokens_are_refused_and_left_as_they_were(family):
    model = build(family)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(dt.DeltatuneError, match="takes no embedded tokens"):
        dt.attach(model, PromptTuning())
    assert kinds == [type(m) for m in model.modules()]


def test_packed_rows_and_made_masks_are_refused():
    model = build("llama")
    dt.attach(model, PromptTuning(length=3))
    ids = inputs(model, length=6)["input_ids"]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    with pytest.raises(dt.DeltatuneError, match="restart within a row"):
        model(input_ids=ids, position_ids=packed)
    with pytest.raises(dt.DeltatuneError, match="one number a token"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(dt.DeltatuneError, match="dynamic cache"):
        generate(model, {"input_ids": ids}, cache_implementation="static")
    with pytest.raises(dt.DeltatuneError, match="padding alone"):
        generate(model, padded("left")[0], prefill_chunk_size=3)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(dt.DeltatuneError, match="counts 9 tokens, but cache and call hold 7"):
        model(input_ids=ids[:, :1], attention_mask=torch.ones(2, 9), past_key_values=cache)


@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
@torch.no_grad()
def test_saved_copied_and_pickled_models_give_the_same(family, tmp_path):
    model = build(family)
    given = inputs(model)
    adapter = dt.attach(model, PromptTuning(length=4), "p")
    want = model(**given).logits
    near(copy.deepcopy(model)(**given).logits, want, 0)
    near(pickle.loads(pickle.dumps(model))(**given).logits, want, 0)
    assert dt.plan(build(family), PromptTuning(length=4)).trained == 4 * 32
    folder, method = adapter.save(tmp_path / "p"), adapter.method
    dt.detach(model)
    assert dt.load(model, folder).method == method
    assert torch.equal(model(**given).logits, want)


def test_a_half_precision_base_keeps_its_precision():
    model = build("llama").to(torch.bfloat16)
    (prompt,) = dt.attach(model, PromptTuning(length=3)).parameters()
    assert prompt.dtype == torch.float32
    assert model(**inputs(model)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom"))
@torch.no_grad()
def test_parity_with_peft(family):
    peft = pytest.importorskip("peft")
    ours = build(family)
    given = inputs(ours)
    theirs = peft.get_peft_model(build(family), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    (prompt,) = dt.attach(ours, PromptTuning(length=4)).parameters()
    prompt.copy_(theirs.prompt_encoder["default"].embedding.weight)
    near(ours(**given).logits, theirs(**given).logits[:, 4:])
