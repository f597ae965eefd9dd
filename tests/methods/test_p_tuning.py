"""P-tuning: pseudo-tokens anywhere in a template, made by an encoder that is gone in the end."""

import pytest
import torch

import deltatune as dt
from deltatune.data import Example
from deltatune.data.encode import IGNORED
from deltatune.data.packing import blocked as of_documents
from deltatune.methods.p_tuning import MLP, BiLSTM, PTuning
from deltatune.methods.prompt import PromptTuning
from deltatune.models.blocks import blockable, blocked, layout
from deltatune.models.prompting import Placed, Prompt
from deltatune.models.tiny import PAD, inputs, tiny

CAUSAL = ("llama", "gpt2", "bloom", "opt", "gemma")
MASKED = ("bert", "roberta")
SEQ2SEQ = ("t5", "bart")
TOKEN = T = 98
WORDS = torch.tensor([11, 42, 7])


def build(family, task="lm", **overrides):
    torch.manual_seed(0)
    return tiny(family, task, **overrides)


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def unit_of(adapter):
    return next(u for _, u in adapter.units() if isinstance(u, Placed | Prompt))


@torch.no_grad()
def words(model, adapter):
    """Make the pseudo-tokens the embeddings of real tokens."""
    dt.flatten(adapter)
    with dt.using(model):
        unit_of(adapter).prompt.copy_(model.get_input_embeddings()(WORDS))


def template(length=6, spread=(0, 2, 5), rows=2, seed=3):
    """Rows of random tokens with placeholders in the given places, and the same with the words in their place."""
    ids = torch.randint(3, 97, (rows, length + len(spread)), generator=torch.Generator().manual_seed(seed))
    literal = ids.clone()
    ids[:, list(spread)], literal[:, list(spread)] = TOKEN, WORDS
    return ids, literal


def given(family, ids, mask=None):
    decoder = {"decoder_input_ids": torch.tensor([[0, 5, 6]]).expand(len(ids), -1)} if family in SEQ2SEQ else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask, **decoder}


@pytest.mark.parametrize("spread", [(0, 1, 2), (1, 4, 5), (0, 3, 8)])
@pytest.mark.parametrize("family", (*CAUSAL, *MASKED, *SEQ2SEQ))
@torch.no_grad()
def test_pseudo_tokens_that_are_real_embeddings_are_the_literal_template(family, spread):
    """Wherever they stand: the same tokens elsewhere are another order of the same embeddings."""
    model = build(family)
    ids, literal = template(spread=spread)
    want = model(**given(family, literal)).logits
    plain = model(**given(family, ids)).logits
    adapter = dt.attach(model, PTuning(length=3, token=TOKEN), "p")
    assert (model(**given(family, ids)).logits - plain).abs().max() > 1e-2
    words(model, adapter)
    near(model(**given(family, ids)).logits, want)
    other, literally = template(spread=(2, 3, 7), seed=4)
    mixed = torch.cat([ids[:1], other[:1]])  # each row has its own template
    near(model(**given(family, mixed)).logits, torch.cat([want[:1], model(**given(family, literally[:1])).logits]))
    if family in SEQ2SEQ:  # the decoder reads its own embeddings
        decoder = {**given(family, ids), "decoder_input_ids": torch.full((2, 3), TOKEN)}
        near(model(**decoder).logits, _alone(model, {**decoder, "input_ids": literal}))
    dt.detach(model)
    assert torch.equal(model(**given(family, ids)).logits, plain)


def _alone(model, batch):
    with dt.using(model):
        return model(**batch).logits


def test_the_encoder_is_the_papers():
    """Against torch's own LSTM; 14 d^2 + 18 d + n d parameters, and n d + 2 (d^2 + d) with the MLP."""
    n, d = 5, 32
    model = build("llama")
    adapter = dt.attach(model, PTuning(length=n))
    source = unit_of(adapter).source
    assert isinstance(source, BiLSTM)
    assert sum(p.numel() for p in adapter.parameters()) == n * d + 14 * d * d + 18 * d
    with torch.no_grad():
        first, relu, last = source.mlp
        lstm = torch.nn.LSTM(d, d // 2, num_layers=2, bidirectional=True, batch_first=True)
        lstm.load_state_dict(dict(source.lstm))
        states, _ = lstm(source.e[None])
        near(source(), torch.relu(states[0] @ first.weight.T + first.bias) @ last.weight.T + last.bias, 1e-6)
    dt.detach(model)
    adapter = dt.attach(model, PTuning(length=n, encoder="mlp"))
    source = unit_of(adapter).source
    assert isinstance(source, MLP)
    assert sum(p.numel() for p in adapter.parameters()) == n * d + 2 * (d * d + d)
    with torch.no_grad():
        first, _, last = source.mlp
        hidden = (source.e @ first.weight.T + first.bias).clamp(min=0)
        near(source(), hidden @ last.weight.T + last.bias, 1e-6)


def test_layers_and_width_of_the_encoder_are_those_asked_for():
    n, d = 4, 32
    model = build("llama")
    source = unit_of(dt.attach(model, PTuning(length=n, layers=3, hidden=5), "lstm")).source
    with torch.no_grad():
        lstm = torch.nn.LSTM(d, 5, num_layers=3, bidirectional=True, batch_first=True)
        lstm.load_state_dict(dict(source.lstm))
        near(source(), source.mlp(lstm(source.e[None])[0][0]), 1e-6)
    assert [m.weight.shape for m in (source.mlp[0], source.mlp[2])] == [(10, 10), (d, 10)]
    source = unit_of(dt.attach(model, PTuning(length=n, encoder="mlp", layers=3, hidden=5), "mlp")).source
    linear = [m for m in source.mlp if isinstance(m, torch.nn.Linear)]
    assert [m.weight.shape for m in linear] == [(5, d), (5, 5), (d, 5)]
    with torch.no_grad():
        x = source.e
        for i, m in enumerate(linear):
            x = m(x if i == 0 else x.clamp(min=0))
        near(source(), x, 1e-6)
    assert dt.plan(build("llama"), PTuning(length=n, hidden=5, layers=3)).trained == sum(
        p.numel() for p in dt.adapters(model)["lstm"].parameters()
    )


@pytest.mark.parametrize("encoder", ("lstm", "mlp", None))
def test_pseudo_tokens_start_from_a_standard_normal(encoder):
    torch.manual_seed(0)
    unit = unit_of(dt.attach(tiny("llama"), PTuning(length=300, encoder=encoder)))
    e = unit.prompt if encoder is None else unit.source.e
    assert e.shape == (300, 32) and abs(e.mean().item()) < 0.05 and abs(e.std().item() - 1) < 0.05


def test_defaults_are_the_papers_kind_of_encoder():
    assert dt.PTuning() == dt.PTuning(length=9, token=None, encoder="lstm", layers=2, hidden=None)


def test_gradients_pass_through_both_directions():
    source = BiLSTM(torch.randn(6, 8), 2, None, {})
    for row, seen in ((0, 5), (5, 0)):
        source.e.grad = None
        source()[seen].sum().backward()
        assert source.e.grad[row].abs().max() > 0
    forwards = BiLSTM(torch.randn(6, 8), 1, None, {})
    with torch.no_grad():
        for name, p in forwards.lstm.items():
            if name.endswith("reverse"):
                p.zero_()
    forwards()[0].sum().backward()
    assert not forwards.e.grad[5].any()


@pytest.mark.parametrize("encoder", ("lstm", "mlp"))
@pytest.mark.parametrize("token", (None, TOKEN))
@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
def test_flat_is_the_network_and_trains_on(family, token, encoder, tmp_path):
    model = build(family)
    batch = given(family, template()[0])
    adapter = dt.attach(model, PTuning(length=3, token=token, encoder=encoder), "p")
    want = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want)
    dt.flatten(adapter)
    assert torch.equal(model(**batch).logits, want)
    assert adapter.method == PTuning(length=3, token=token, encoder=None)
    (prompt,) = adapter.parameters()
    assert prompt.shape == (3, 32) and prompt.requires_grad
    adapter.save(tmp_path)
    dt.detach(model)
    again = dt.load(model, tmp_path)
    near(model(**batch).logits, want, 0)
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in again.parameters())


def _steps(model, adapter, batch, n):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    for _ in range(n):
        optimizer.zero_grad()
        model(**batch).logits.logsumexp(-1).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", (PTuning(length=3, token=TOKEN), PromptTuning(length=3)), ids=["p", "prompt"])
@pytest.mark.parametrize("family", ("llama", "bert"))
def test_training_goes_on_from_what_was_saved(family, method, tmp_path):
    model, other = build(family), build(family)
    batch = given(family, template()[0])
    adapter = dt.attach(model, method, "p")
    start = {k: t.clone() for k, t in adapter.state_dict().items()}
    _steps(model, adapter, batch, 3)
    adapter.save(tmp_path)
    _steps(model, adapter, batch, 3)
    again = dt.load(other, tmp_path)
    _steps(other, again, batch, 3)
    for name, t in adapter.state_dict().items():
        assert not torch.equal(t, start[name])
        near(again.state_dict()[name], t, 1e-6)


def padded(side, pads=(0, 2, 4)):
    ids, literal = template(length=7, spread=(1, 3, 4), rows=len(pads))
    mask = torch.ones(len(pads), 14, dtype=torch.long)
    out = []
    for whole in (ids, literal):
        rows = torch.full((len(pads), 14), PAD)
        for i, n in enumerate(pads):
            row = whole[i, : len(whole[i]) - n]
            start = 14 - len(row) if side == "left" else 0
            rows[i, start : start + len(row)], mask[i] = row, 0
            mask[i, start : start + len(row)] = 1
        out.append(rows)
    return *out, mask


def generate(model, ids, mask, **options):
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=None,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "opt", "t5", "bart"))
@torch.no_grad()
def test_generation_is_that_of_the_literal_template(family):
    model = build(family)
    ids, literal, mask = padded("left" if family != "bart" else "right")
    n = 0 if family in SEQ2SEQ else ids.shape[1]
    want = generate(model, literal, mask)[:, n:]
    words(model, dt.attach(model, PTuning(length=3, token=TOKEN), "p"))
    for options in ({}, {"use_cache": False}):
        assert torch.equal(generate(model, ids, mask, **options)[:, n:], want), options
    assert torch.equal(
        generate(model, ids, mask, num_beams=2), generate(model, ids, mask, num_beams=2, use_cache=False)
    )


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bloom", "bert", "roberta", "t5"))
@torch.no_grad()
def test_rows_padding_and_other_adapters(family, side):
    """A row under another adapter, or none, keeps whatever it holds; padding on either side changes nothing."""
    model = build(family)
    dt.attach(model, PTuning(length=3, token=TOKEN), "p")
    dt.attach(model, PTuning(length=4), "before")
    ids, _, mask = padded(side)
    ids[1, 5] = ids[2, 5] = 50  # fewer than three placeholders there
    names = ["p", None, "before"]
    with dt.using(model, router=dt.PerRow(names)):
        got = model(**given(family, ids, mask)).logits
    for i, name in enumerate(names):
        row = ids[i][mask[i].bool()][None]
        with dt.using(model, *([name] if name else [])):
            want = model(**given(family, row)).logits[0]
        near(got[i] if family in SEQ2SEQ else got[i][mask[i].bool()], want)


@torch.no_grad()
def test_packed_documents_have_their_own_pseudo_tokens():
    model = build("llama")
    dt.attach(model, PTuning(length=3, token=TOKEN))
    one, two = template(length=3, rows=1)[0], template(length=5, rows=1, seed=8)[0]
    places = torch.cat([torch.arange(one.shape[1]), torch.arange(two.shape[1])])[None]
    got = model(input_ids=torch.cat([one, two], 1), position_ids=places, use_cache=False).logits
    near(got, torch.cat([model(input_ids=one).logits, model(input_ids=two).logits], 1))


def in_blocks(model, documents):
    """The logits of each document, of a row in which what they share is computed once; and how much that is."""
    batch = of_documents([Example(list(d), [IGNORED] * 6 + list(d[6:])) for d in documents])
    with blocked(model), layout(batch.blocks):
        logits = model(**batch.inputs).logits[0]
    shared, *own = logits.split([batch.blocks.shared, *batch.blocks.lengths])
    return [torch.cat([shared, part]) for part in own], len(shared)


@pytest.mark.parametrize("begin", [(), (T,), (T, 5, T), (8, T, T, 6, T)])
@pytest.mark.parametrize("family", ("llama", "gpt2"))
@torch.no_grad()
def test_documents_that_share_their_beginning_have_their_own_pseudo_tokens(family, begin):
    """Of which some may lie in what they share, and a document may hold several templates."""
    model = build(family)
    dt.attach(model, PTuning(length=3, token=TOKEN, encoder=None))
    rest = [TOKEN] * (3 - begin.count(TOKEN))
    documents = [[*begin, 10 + i, *rest, *range(20 + i, 22 + 2 * i)] for i in range(4)]
    documents[2] += [TOKEN, 7, TOKEN, TOKEN]
    assert blockable(model, 20)
    got, shared = in_blocks(model, documents)
    assert shared == len(begin)
    for logits, document in zip(got, documents, strict=True):
        near(logits, model(input_ids=torch.tensor([document])).logits[0])
    documents[1].remove(TOKEN)
    documents[3].append(TOKEN)  # the row as a whole still holds whole templates
    with pytest.raises(dt.DeltatuneError, match="which stand for 3 pseudo-tokens"):
        in_blocks(model, documents)


@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
@torch.no_grad()
def test_without_a_token_they_stand_where_a_prompt_does(family):
    model = build(family)
    batch = inputs(model)
    p = dt.attach(model, PTuning(length=4), "p")
    prompt = dt.attach(model, dt.PromptTuning(length=4), "prompt")
    unit_of(prompt).prompt.copy_(unit_of(p).vectors())
    want = model(**batch).logits
    dt.activate(model, "p")
    assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_a_decoder_sees_all_pseudo_tokens_before_a_padded_row(family):
    model = build(family)
    dt.attach(model, PTuning(length=4))
    ids, _, mask = padded("right")
    got = model(**given(family, ids, mask)).logits
    for i in range(3):
        near(got[i], model(**given(family, ids[i][mask[i].bool()][None])).logits[0])


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "t5"))
def test_activation_checkpointing_keeps_the_gradient(family, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = build(family).train()
        adapter = dt.attach(model, PTuning(length=3, token=TOKEN))
        torch.manual_seed(2)
        for p in adapter.parameters():
            torch.nn.init.normal_(p, std=0.3)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        batch = given(family, template()[0])
        model(**batch, use_cache=False).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
    assert all(g.abs().max() > 0 for g in grads[0])
    near(*grads)


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_placed_tokens_compile_into_one_graph(family):
    torch._dynamo.reset()
    model = build(family)
    dt.attach(model, PTuning(length=3, token=TOKEN))
    batch = given(family, template()[0])
    want = model(**batch).logits
    near(torch.compile(model, fullgraph=True, backend="eager")(**batch).logits, want, 1e-4)


@pytest.mark.parametrize("family", ("bert", "llama", "t5"))
def test_the_loss_falls_and_the_base_stays(family):
    model = build(family).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = dt.attach(model, PTuning(length=3, token=TOKEN))
    batch = given(family, template()[0])
    labels = batch.pop("decoder_input_ids", batch["input_ids"]).roll(-1, 1)
    step = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = model(**batch, labels=labels).loss
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    dt.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"encoder": "gru"}, "'lstm', 'mlp' or None, got 'gru'"),
        ({"token": 99}, "token 99 is not among the 99"),
        ({"token": -1}, "token must be at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(dt.DeltatuneError, match=message):
        dt.attach(build("llama"), PTuning(**options))


def test_a_template_that_was_cut_is_refused():
    model = build("llama")
    dt.attach(model, PTuning(length=3, token=TOKEN))
    ids = template()[0]
    with pytest.raises(dt.DeltatuneError, match="2 tokens 98, which stand for 3 pseudo-tokens"):
        model(input_ids=ids[:, 1:])
    with pytest.raises(dt.DeltatuneError, match="a chunk"):
        generate(model, ids, torch.ones_like(ids), prefill_chunk_size=4)
