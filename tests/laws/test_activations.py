"""What acts on activations or adds a prompt does to a row what it does to that row alone, on every architecture."""

from __future__ import annotations

from zlib import crc32

import pytest
import table
import torch
from table import ARCHITECTURES, model, perturb

import deltatune as dt
from deltatune.models.tiny import PAD, inputs

NO_BIAS = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix"), ("prefix", "lora"))
PROMPTS = ("prompt", "p-tuning", "multitask prompt", "intrinsic prompt")
NAMES = PROMPTS + (
    "prefix, mlp", "p-tuning v2", "houlsby", "pfeiffer", "parallel", "adapter fusion, pfeiffer", "adapter drop",
    "adapter drop, specialised", "adamix", "compacter", "compacter++", "phm adapter", "sparse adapter", "ladder",
    "ladder, residual", "mam", "unipelt", "s4",
)  # fmt: skip
METHODS = {name: table.METHODS[name] for name in NAMES} | {"s4, no bitfit": dt.S4(budget=1500, strategies=NO_BIAS)}
# they number the real tokens of a row themselves
NUMBERING = (*PROMPTS, "prefix, mlp", "p-tuning v2", "mam", "unipelt", "s4", "s4, no bitfit")
UNTABLED = ("opt", "roberta", "bart")  # the other laws do not try these
FAMILIES = (*ARCHITECTURES, *UNTABLED)
SEQ2SEQ = ("t5", "bart")
GENERATING = [f for f in FAMILIES if f not in ("bert", "roberta")]
COUNTING = ("gpt2", "bert")  # they number positions from the left end of a row, pads too, unless told otherwise
SIDES = {f: ("left", "right") for f in FAMILIES} | {"bart": ("right",)}  # it counts, and cannot be told
PACKING = ("llama", "gpt2")  # the others do not see in positions where a document begins


def cells(law, families=FAMILIES):
    """A parameter of tests: of each method one family, another in each law, is quick."""
    found = []
    for method in METHODS:
        able = [f for f in families if (method, f) not in table.REFUSED]
        chosen = able[crc32(f"{law} {method}".encode()) % len(able)]
        marks = {f: () if f == chosen else (pytest.mark.slow,) for f in able}
        found += [pytest.param(method, f, id=f"{method}-{f}", marks=marks[f]) for f in able]
    return pytest.mark.parametrize("method,family", found)


def padded(side, pads, length=6):
    """Rows with that many pads on `side`, as a batch, and each without them with the slice of the batch it lies in."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.full((len(pads), length), PAD), torch.zeros(len(pads), length, dtype=torch.long)
    rows = []
    for i, n in enumerate(pads):
        at = slice(n, length) if side == "left" else slice(0, length - n)
        ids[i, at], mask[i, at] = torch.randint(3, 99, (length - n,), generator=generator), 1
        rows.append((ids[i : i + 1, at], at))
    return {"input_ids": ids, "attention_mask": mask}, rows


def positions(family, given):
    return {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)} if family in COUNTING else {}


def logits(net, input_ids, **given):
    if net.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.tensor([[0, 5, 6]]).expand(len(input_ids), -1)
    return net(input_ids=input_ids, **given).logits


def put(net, method, name="default", seed=1):
    return perturb(dt.attach(net, METHODS[method], name), seed, size=0.2)


def near(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def acts(net, given, got):
    """Else a law would hold because nothing was done."""
    with dt.using(net):
        assert (got - logits(net, **given)).abs().max() > 1e-2


def each_alone(net, family, got, rows):
    for i, (row, at) in enumerate(rows):
        near(got[i] if family in SEQ2SEQ else got[i, at], logits(net, row)[0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bases_that_count_pads_or_do_not_see_documents_are_those_named(family):
    net = model(family)
    given, rows = padded("right", (0, 3))
    each_alone(net, family, logits(net, **given), rows)
    given, ((row, at), *_) = padded("left", (3,))
    got, want = logits(net, **given)[0], logits(net, row)[0]
    moved = (got if family in SEQ2SEQ else got[at]) - want
    assert (moved.abs().max() > 0.1) == (family in COUNTING or family == "bart")
    near(logits(net, **given, **positions(family, given))[0, at] if family in COUNTING else want, want)
    if family not in SEQ2SEQ:
        got, want = packed(net)
        assert ((got - want).abs().max() < 1e-4) == (family in PACKING)


@cells("padding")
@torch.no_grad()
def test_pads_on_either_side_change_nothing(method, family):
    net = model(family)
    put(net, method)
    for side in SIDES[family]:
        given, rows = padded(side, (0, 1, 3))
        for told in ({}, positions(family, given)) if method in NUMBERING else (positions(family, given),):
            got = logits(net, **given, **told)
            each_alone(net, family, got, rows)
            acts(net, given | told, got)


def packed(net):
    """The logits of documents of three and of five tokens: in one row, and alone."""
    ids, numbers = inputs(net, batch=1, length=8)["input_ids"], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    together = {"input_ids": ids, "position_ids": numbers}
    together |= {} if net.config.model_type in ("bert", "roberta") else {"use_cache": False}
    return logits(net, **together), torch.cat([logits(net, ids[:, :3]), logits(net, ids[:, 3:])], 1)


@cells("packing", PACKING)
@torch.no_grad()
def test_packed_documents_are_each_alone(method, family):
    net = model(family)
    put(net, method)
    if method in PROMPTS:
        with pytest.raises(dt.DeltatuneError, match="only the first of the packed documents would see the prompt"):
            packed(net)
        return
    got, want = packed(net)
    near(got, want)
    acts(net, {"input_ids": inputs(net, batch=1, length=8)["input_ids"]}, want)


def generated(net, given, **options):
    """The logits (beams of all rows, steps, tokens) that a beam search of every row went by."""
    how = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    found = net.generate(**given, **how, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(found.logits, 1)


@cells("generation", GENERATING)
@torch.no_grad()
def test_padded_rows_are_generated_as_each_alone_with_and_without_a_cache(method, family):
    net = model(family)
    put(net, method)
    given, rows = padded("right" if family == "bart" else "left", (0, 3))
    got = generated(net, given)
    near(generated(net, given, use_cache=False), got)
    row, _ = rows[1]
    near(got[2:], generated(net, {"input_ids": row, "attention_mask": torch.ones_like(row)}))
    with dt.using(net):
        assert (got[:, 0] - generated(net, given)[:, 0]).abs().max() > 1e-2


def beside(method, family):
    """A method of another kind that the family can have, another for each."""
    names = list(METHODS)
    at = (names.index(method) + len(names) // 2 + 1) % len(names)
    later = names[at:] + names
    return next(n for n in later if (n, family) not in table.REFUSED)


@cells("rows")
@torch.no_grad()
def test_rows_of_adapters_of_several_methods_are_each_alone(method, family):
    net = model(family)
    put(net, method, "first")
    put(net, method, "second", seed=2)
    put(net, beside(method, family), "other", seed=3)
    given, rows = padded("right", (1, 0, 3, 2))
    names = ["first", "other", None, "second"]
    with dt.using(net, router=dt.PerRow(names)):
        got = logits(net, **given)
    for i, (name, (row, at)) in enumerate(zip(names, rows, strict=True)):
        with dt.using(net, *([name] if name else [])):
            near(got[i] if family in SEQ2SEQ else got[i, at], logits(net, row)[0])
    for i in (0, 1, 3):
        with dt.using(net):
            assert (got[i] - logits(net, **given)[i]).abs().max() > 1e-2


@cells("checkpointing", UNTABLED)
def test_activation_checkpointing_gives_the_same_gradients(method, family):
    net = model(family)
    given = inputs(net, batch=8)
    adapter = put(net, method)
    net.train()
    found = []
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if how:
            net.gradient_checkpointing_enable(how)
        if how and how["use_reentrant"]:  # the old kind needs an input that requires gradients
            net.enable_input_require_grads()
        torch.manual_seed(2)  # for what the method draws
        net.zero_grad()
        table.loss(net, given).backward()
        found.append({n: p.grad.clone() for n, p in adapter.named_parameters()})
    assert all(g.any() for n, g in found[0].items())
    for again in found[1:]:
        for n, g in found[0].items():
            torch.testing.assert_close(again[n], g, atol=1e-4, rtol=1e-3)
