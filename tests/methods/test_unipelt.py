"""UniPELT: what its gates are means of, and that with constant gates it is its three parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.methods.gated import Gated, GatedLoRA, GatedPrefix, Reading
from deltatune.methods.lora import LowRank
from deltatune.methods.pfeiffer import Bottleneck
from deltatune.models.prefixing import Prefix
from deltatune.models.tiny import PAD, inputs, tiny
from deltatune.models.visible import Gate, Seen

SMALL = {"length": 3, "hidden": 6, "r": 2, "size": 4}


def adapted(family, name="default", seed=1, size=0.3, model=None, **options):
    if model is None:
        torch.manual_seed(0)
        model = tiny(family, **options).double()
    adapter = dt.attach(model, dt.UniPELT(**SMALL), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * size)
    return model, adapter


def near(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def padded(side, lengths=(6, 4, 2)):
    torch.manual_seed(1)
    rows, n = [torch.randint(3, 99, (k,)) for k in lengths], max(lengths)
    ids, mask = torch.full((len(rows), n), PAD), torch.zeros(len(rows), n, dtype=torch.long)
    spans = [slice(n - len(r), n) if side == "left" else slice(0, len(r)) for r in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], mask[i, span] = row, 1
    return {"input_ids": ids, "attention_mask": mask}, rows, spans


def gates(unit):
    return [m for m in unit.modules() if isinstance(m, Gate)]


@pytest.mark.parametrize("family,side,causal", [("llama", "left", True), ("gpt2", "right", True), ("opt", "left", True),
                                                ("bert", "right", False), ("roberta", "right", False)])  # fmt: skip
def test_a_gate_is_the_mean_of_sigmoids_over_what_a_token_sees(family, side, causal):
    model, adapter = adapted(family)
    seen = {}
    for name, unit in adapter.units():
        for i, gate in enumerate(gates(unit)):
            gate.register_forward_hook(lambda m, args, y, at=(name, i): seen.__setitem__(at, (m, args[0], y)))
    given, _, spans = padded(side)
    model(**given)
    assert len(seen) == 2 * 4  # in each of two blocks: prefix, queries, values, adapter
    for gate, x, y in seen.values():
        x, y = x.view(3, 6, -1), y.view(3, 6)
        each = 1 / (1 + torch.exp(-(x @ gate.weight[0] + gate.bias)))
        assert ((y > 0) & (y < 1))[given["attention_mask"].bool()].all()
        for row, span in enumerate(spans):
            for t in range(6)[span]:
                last = t + 1 if causal else span.stop
                near(y[row, t], each[row, span.start : last].mean())
        if not causal:
            near(y, y[:, :1].expand(-1, 6))  # one number a row, as in the paper


def test_gates_of_an_encoder_and_a_decoder_see_their_own_side():
    model, adapter = adapted("t5")
    seen = {}
    for name, unit in adapter.units():
        for gate in gates(unit):
            gate.register_forward_hook(lambda m, args, y, at=name: seen.__setitem__(at, y))
    model(**inputs(model))
    assert len(seen) == 2 * 4 + 2 * 5  # cross-attention's prefix has one
    assert not any("EncDecAttention.v" in n or "EncDecAttention.q" in n for n in seen)
    for name, y in seen.items():
        same = torch.allclose(y, y[:, :1].expand_as(y), atol=1e-12)
        assert same == name.startswith("encoder"), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_with_constant_gates_it_is_prefix_tuning_lora_and_an_adapter(family):
    """G_L = alpha / r, G_P in the keys and values, G_A in W_up."""
    model, adapter = adapted(family)
    g = {GatedPrefix: 0.3, GatedLoRA: 0.6, Gated: 0.8}
    with torch.no_grad():
        for _, unit in adapter.units():
            share = next((v for k, v in g.items() if isinstance(unit, (k, Reading) if k is GatedPrefix else k)), None)
            for gate in gates(unit):
                gate.weight.zero_()
                gate.bias.fill_(math.log(share / (1 - share)))
    given = inputs(model)
    got = model(**given).logits
    parts = (
        dt.PrefixTuning(length=3),
        dt.LoRA(r=2, alpha=2 * g[GatedLoRA], targets=dt.Part("q", "v")),
        dt.Pfeiffer(size=4),
    )
    plain = dt.attach(model, dt.Union(methods=parts), "plain")
    assert (model(**given).logits - got).abs().max() > 1e-2
    own, others = ([u for _, u in a.units()] for a in (adapter, plain))
    products = [d for u in own if isinstance(u, GatedLoRA) for d in u.deltas]
    deltas = [m for u in others for m in u.modules() if isinstance(m, LowRank)]
    with torch.no_grad():
        for mine, other in zip((u for u in own if isinstance(u, GatedPrefix)),
                               (u for u in others if isinstance(u, Prefix)), strict=True):  # fmt: skip
            for t, p in zip(mine.source(), (other.source.k, other.source.v), strict=True):
                p.copy_(g[GatedPrefix] * t)
        for mine, other in zip(products, deltas, strict=True):
            other.a.copy_(mine.a)
            other.b.copy_(mine.b)
        for mine, other in zip((u for u in own if isinstance(u, Gated)),
                               (u for u in others if isinstance(u, Bottleneck)), strict=True):  # fmt: skip
            other.load_state_dict({k: v for k, v in mine.state_dict().items() if "gate" not in k})
            other.up.mul_(g[Gated])
            other.up_bias.mul_(g[Gated])
    near(model(**given).logits, got)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt", "roberta", "t5", "bart"])
@torch.no_grad()
def test_with_open_gates_and_nothing_else_it_is_prefix_tuning(family):
    """Whatever the architecture divides its scores by, caps them at or adds to them."""
    model, adapter = adapted(family)
    for _, unit in adapter.units():
        for gate in gates(unit):
            gate.weight.zero_()
            gate.bias.fill_(50.0)
        for m in unit.modules():
            if isinstance(m, LowRank):
                m.b.zero_()
            if isinstance(m, Bottleneck):
                m.up.zero_()
                m.up_bias.zero_()
    given = inputs(model)
    got = model(**given).logits
    plain = dt.attach(model, dt.PrefixTuning(length=3), "plain")
    own, others = ([u for _, u in a.units() if isinstance(u, Prefix)] for a in (adapter, plain))
    for mine, other in zip(own, others, strict=True):
        for t, p in zip(mine.source(), (other.source.k, other.source.v), strict=True):
            p.copy_(t)
    near(model(**given).logits, got, 1e-9)
    with dt.using(model):
        assert (model(**given).logits - got).abs().max() > 1e-2


def test_dropout_hides_some_of_the_prefix_in_training_alone():
    torch.manual_seed(0)
    model = tiny("llama")
    dt.attach(model, dt.UniPELT(**SMALL, dropout=0.5))
    given = inputs(model)
    assert torch.equal(model(**given).logits, model(**given).logits)
    model.train()
    assert not torch.equal(model(**given).logits, model(**given).logits)


def test_defaults_are_the_papers():
    assert dt.UniPELT() == dt.UniPELT(length=10, hidden=512, r=8, size=48, dropout=0.0)


def test_a_prefix_is_weighed_for_each_query():
    """softmax(q_t [G_t P_k; K]) [G_t P_v; V], grouped heads included."""
    torch.manual_seed(0)
    b, heads, kv, n, p, d = 2, 4, 2, 5, 3, 4
    query, key, value = (torch.randn(b, h, n, d, dtype=torch.float64) for h in (heads, kv, kv))
    pk, pv = torch.randn(2, kv, p, d, dtype=torch.float64)
    g = torch.rand(b, n, 1, dtype=torch.float64)
    mask = torch.ones(n, n, dtype=torch.bool).tril().expand(b, 1, n, n)

    class Source(nn.Module):
        def forward(self):
            return pk, pv

    class Call:
        module = nn.Identity()

        def __call__(self, q, k, v, m, scaling):
            k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
            return ((q @ k.mT * scaling).masked_fill(~m, -torch.inf).softmax(-1) @ v).transpose(1, 2), None

    class At:
        def now(self):
            return Seen(1, b, n, None, True, None, gate=g)

    got, _ = GatedPrefix(Source(), 0.0, At())(Call(), query, key, value, mask)
    for i, h, t in [(i, h, t) for i in range(b) for h in range(heads) for t in range(n)]:
        k, v = (torch.cat([g[i, t] * a[h // 2], c[i, h // 2, : t + 1]]) for a, c in ((pk, key), (pv, value)))
        near(got[i, t, h], (k @ query[i, h, t] / d**0.5).softmax(0) @ v)


def test_a_prefix_gate_of_zero_is_not_no_prefix():
    model, adapter = adapted("bert")
    given = inputs(model)
    with torch.no_grad():
        for _, unit in adapter.units():
            for gate in gates(unit):
                gate.bias.fill_(-1e6)
    got = model(**given).logits
    with dt.using(model):
        assert (model(**given).logits - got).abs().max() > 1e-2  # keys of zero take their share of the softmax


@pytest.mark.parametrize("family,side", [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("opt", "left"),
                                         ("bert", "right"), ("t5", "right"), ("bart", "right")])  # fmt: skip
def test_padding_changes_nothing(family, side):
    model, _ = adapted(family)
    given, rows, spans = padded(side)
    beside = {"decoder_input_ids": torch.tensor([[0, 5, 7, 9]])} if family in ("t5", "bart") else {}
    together = model(**given, **{k: v.expand(3, -1) for k, v in beside.items()}).logits
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        alone = model(input_ids=row[None], **beside).logits[0]
        near(together[i] if beside else together[i, span], alone, 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_have_gates_of_their_own(family):
    model, _ = adapted(family)
    one, two = torch.tensor([[5, 9, 3, 8]]), torch.tensor([[7, 6, 4]])
    ids, at = torch.cat([one, two], 1), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    packed = model(input_ids=ids, position_ids=at, use_cache=False).logits
    near(packed[:, :4], model(input_ids=one).logits)
    near(packed[:, 4:], model(input_ids=two).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "t5", "bart"])
def test_generation_with_a_cache_is_that_without(family):
    model, _ = adapted(family)
    given, _, _ = padded("left" if family not in ("t5", "bart") else "right", (6, 4))
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "output_scores": True}
    for beams in (1, 3):
        with_, without = (
            model.generate(**given, **options, num_beams=beams, use_cache=c, return_dict_in_generate=True)
            for c in (True, False)
        )
        assert torch.equal(with_.sequences, without.sequences)
        near(torch.stack(with_.scores), torch.stack(without.scores), 1e-6)


@torch.no_grad()
def test_a_cache_can_be_cut_and_gone_on_from():
    model, _ = adapted("llama")
    ids = torch.tensor([[5, 9, 3, 8, 7, 6]])
    from transformers import DynamicCache

    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        model(input_ids=torch.tensor([[5, 9, 3, 8, 60, 61]]), past_key_values=cache)
        cache.crop(-2)
        near(model(input_ids=ids[:, 4:], past_key_values=cache).logits, model(input_ids=ids).logits[:, 4:])


def test_a_cache_of_fixed_places_is_refused():
    model, _ = adapted("llama")
    with pytest.raises(dt.DeltatuneError, match="DynamicCache"):
        model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=2, cache_implementation="static")


def test_rows_name_their_adapters_and_generate():
    model, _ = adapted("llama", "one")
    adapted("llama", "two", seed=2, model=model)
    dt.attach(model, dt.LoRA(r=2), "lora")
    with torch.no_grad():
        for p in dt.adapters(model)["lora"].parameters():
            p.add_(0.05)
    given, _, _ = padded("left", (6, 4, 2, 5, 6))
    names = ["two", None, "one", "lora", "two"]
    want = {}
    for name in set(names):
        dt.activate(model, *([name] if name else []))
        want[name] = model.generate(**given, max_new_tokens=6, do_sample=False, output_logits=True,
                                    return_dict_in_generate=True, min_new_tokens=6)  # fmt: skip
    dt.activate(model, router=dt.PerRow(names))
    got = model.generate(**given, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
                         min_new_tokens=6)  # fmt: skip
    for i, name in enumerate(names):
        assert torch.equal(got.sequences[i], want[name].sequences[i])
        near(torch.stack(got.logits)[:, i], torch.stack(want[name].logits)[:, i], 1e-9)
    assert not torch.equal(want["one"].sequences, want["two"].sequences)


def test_another_prefix_may_stand_inside_or_outside():
    model, _ = adapted("llama")
    dt.attach(model, dt.PrefixTuning(length=2), "prefix")
    given, outs = inputs(model), []
    for order in (("default", "prefix"), ("prefix", "default")):
        dt.activate(model, *order)
        outs.append(model(**given).logits)
    near(*outs)


def test_counts_the_parts_and_a_gate_for_each():
    """Per block of Llama: prefix, adapter, LoRA at q and v, and (d + 1) a gate; the prefix's network once."""
    d, kv, p, m, r, a = 32, 16, 3, 6, 2, 4
    block = (m + 1) * 2 * kv + (2 * d * a + d + a) + r * (d + d) + r * (d + kv) + 4 * (d + 1)
    assert dt.plan(tiny("llama"), dt.UniPELT(**SMALL)).trained == 2 * block + p * d + (d + 1) * m


def test_flattens():
    model, adapter = adapted("llama")
    given = inputs(model)
    want = model(**given).logits
    dt.flatten(adapter)
    assert adapter.method.hidden is None and torch.equal(model(**given).logits, want)
    assert not any("trunk" in n or "shared" in n for n in adapter.state_dict())


def test_what_does_not_fit_is_refused():
    with pytest.raises(dt.DeltatuneError, match="computes attention by itself"):
        dt.attach(tiny("bloom"), dt.UniPELT(**SMALL))
    for wrong in ({"r": 0}, {"size": 0}, {"length": 0}, {"targets": "self_attn"}):
        with pytest.raises(dt.DeltatuneError, match=f"UniPELT.*{next(iter(wrong))}"):
            dt.UniPELT(**wrong)
