"""Intrinsic prompt tuning (arXiv:2110.07867): the subspace that several prompts share, and tuning within it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs_of import documents, run_on_llama

import deltatune as dt
from deltatune.callbacks.transfer import transfer
from deltatune.core import Run
from deltatune.data import Batches, Example
from deltatune.methods.intrinsic_prompt import Decoded
from deltatune.methods.intrinsic_subspace import Autoencoder, autoencoder
from deltatune.models.tiny import PAD, inputs, tiny
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions

FAMILIES = ("llama", "gpt2", "bloom", "opt", "bert", "roberta", "t5", "bart")
TASKS = ("squad", "mnli", "sst2")
SIZE = {"dim": 8, "hidden": 16}


def build(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return tiny(family)


def tuned(length: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {task: torch.randn(length, 32, generator=g) for task in TASKS}


def subspace(model: Any, **options: Any) -> dt.Adapter:
    torch.manual_seed(5)
    return autoencoder(model, tuned(), **(SIZE | options))


def own(adapter: dt.Adapter, kind: type) -> Any:
    return next(m for _, u in adapter.units() for m in u.modules() if isinstance(m, kind))


def near(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def decoded(state: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """W_3 tanh(W_2 z + b_2) + b_3 in float64, number by number of the sums."""
    w2, b2, w3, b3 = (
        state[f"model.0.source.decoder.{n}"].double() for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    )
    h = torch.stack([torch.tanh(sum(w2[i, j] * z[j].double() for j in range(len(z))) + b2[i]) for i in range(len(b2))])
    return (w3 * h).sum(1) + b3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_prompt_is_what_the_decoder_makes_of_z(family: str) -> None:
    """And the same for all rows of a batch."""
    model = build(family)
    adapter = dt.attach(model, dt.IntrinsicPrompt(length=4, **SIZE), "ipt")
    state = {n.replace(n.partition(".0.source")[0], "model", 1): t for n, t in adapter.state_dict().items()}
    given = inputs(model, batch=3)
    got = model(**given).logits
    plain = dt.attach(model, dt.PromptTuning(length=4), "plain")
    want = decoded(state, own(adapter, Decoded).z).view(4, 32)
    next(iter(plain.parameters())).copy_(want)
    near(got, model(**given).logits)


def test_z_alone_is_trained_and_the_decoder_is_saved_with_it(tmp_path: Any) -> None:
    model = build()
    adapter = dt.attach(model, dt.IntrinsicPrompt(length=4, dim=11, hidden=16), "ipt")
    assert [tuple(p.shape) for p in adapter.parameters()] == [(11,)]
    assert dt.plan(build(), dt.IntrinsicPrompt(length=4, dim=11, hidden=16)).trained == 11
    z = own(dt.attach(build(), dt.IntrinsicPrompt(length=1, dim=4000, hidden=1)), Decoded).z.detach()
    assert abs(z.mean()) < 1.5e-3 and 0.019 < z.std() < 0.021
    decoder = {n: t.clone() for n, t in own(adapter, Decoded).decoder.state_dict().items()}
    assert sum(t.numel() for t in decoder.values()) == 16 * 11 + 16 + 16 * 128 + 128
    given = inputs(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(**given).logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(t, decoder[n]) for n, t in own(adapter, Decoded).decoder.state_dict().items())
    other = build()
    dt.load(other, adapter.save(tmp_path))
    assert torch.equal(other(**given).logits, model(**given).logits)


def test_the_numbers_of_parameters_at_the_papers_size() -> None:
    with torch.device("meta"):
        bart = tiny("bart", d_model=768, encoder_attention_heads=12, decoder_attention_heads=12)
    d, pd = 250, 76_800
    decoder = 768 * d + 768 + 768 * pd + pd
    assert dt.plan(bart, dt.IntrinsicPrompt(length=100)).trained == d
    assert dt.plan(bart, dt.IntrinsicSubspace(length=100, tasks=("a", "b"))).trained == decoder + d * pd + d
    assert 59.05e6 < decoder - 768 * d < 59.15e6


def test_a_wide_enough_autoencoder_can_be_the_identity() -> None:
    """With d_I = p d; tanh is the identity in the limit of small arguments."""
    model = build().double()
    adapter = subspace(model, dim=128, hidden=128)
    auto = own(adapter, Autoencoder)
    with torch.no_grad():
        for p in auto.parameters():
            p.zero_()
        one = torch.eye(128, dtype=torch.float64)
        for layer, factor in ((auto.encoder, 1), (auto.decoder[0], 1e-5), (auto.decoder[2], 1e5)):
            layer.weight.copy_(factor * one)
    for i, prompt in enumerate(auto.prompts):
        near(auto(i), prompt, 1e-8)
    assert auto.error() < 1e-16


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_the_z_of_a_source_task_tuning_begins_at_its_prompt_to_the_bit(family: str, tmp_path: Any) -> None:
    model = build(family)
    adapter = subspace(model)
    folder = adapter.save(tmp_path / "subspace")
    given = inputs(model)
    for source in (adapter, folder):
        target = dt.attach(model, dt.IntrinsicPrompt(length=4, **SIZE), "target")
        transfer(target, source, "mnli")
        want = own(adapter, Autoencoder)(1)
        assert torch.equal(own(target, Decoded)(), want)
        got = model(**given).logits
        with dt.using(model, router=dt.PerRow(["subspace.mnli"])):
            near(got, model(**given).logits, 1e-6)
        z = own(target, Decoded).z.clone()
        transfer(target, source)  # the decoder alone
        assert torch.equal(own(target, Decoded).z, z)
        dt.flatten(target)
        assert target.method == dt.PromptTuning(length=4)
        (prompt,) = target.parameters()
        assert torch.equal(prompt, want) and torch.equal(model(**given).logits, got)
        dt.detach(model, "target")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_one_batch_name_their_source_tasks(family: str) -> None:
    model = build(family)
    auto = own(subspace(model), Autoencoder)
    target = dt.attach(model, dt.IntrinsicPrompt(length=4, **SIZE), "target")
    given = inputs(model, batch=4)
    names = ["subspace.sst2", "target", "subspace.squad", None]
    with dt.using(model, router=dt.PerRow(names)):
        got = model(**given).logits
    plain = dt.attach(model, dt.PromptTuning(length=4), "plain")
    for i, prompt in ((0, auto(2)), (1, own(target, Decoded)()), (2, auto(0))):
        next(iter(plain.parameters())).copy_(prompt)
        near(got[i], model(**{k: v[i : i + 1] for k, v in given.items()}).logits[0])
    assert not torch.allclose(got[0], model(**given).logits[0], atol=1e-3)


@pytest.mark.parametrize("family", ("llama", "bloom", "t5"))
@torch.no_grad()
def test_rows_generate_with_and_without_a_cache(family: str) -> None:
    model = build(family)
    subspace(model)
    dt.attach(model, dt.IntrinsicPrompt(length=6, **SIZE), "target")
    given = {k: v for k, v in inputs(model, batch=2).items() if k != "decoder_input_ids"}
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with dt.using(model, router=dt.PerRow(["subspace.squad", "target"])):
        assert torch.equal(model.generate(**given, **how), model.generate(**given, **how, use_cache=False))


# The first stage


def mixed(n: int = 12) -> list[Example]:
    return [replace(e, adapter=f"subspace.{TASKS[i % 3]}") for i, e in enumerate(documents(n))]


OPTIONS = {"lr": 3e-3, "batch_size": 6, "schedule": "constant", "precision": "fp32"}


def test_the_loss_is_the_tasks_and_alpha_times_the_mean_square() -> None:
    model = build()
    adapter = subspace(model, alpha=3.0)
    run = Run(model, adapter, steps=1, share=0.5)
    (events,) = (c.start(run) for c in adapter.callbacks())
    events.on_train_start(run)
    state = adapter.state_dict()
    errors = []
    for prompt in tuned().values():
        z = state["model.0.source.encoder.weight"].double() @ prompt.flatten().double()
        near_prompt = decoded(state, z + state["model.0.source.encoder.bias"])
        errors += (near_prompt - prompt.flatten().double()).square().tolist()
    got = events.on_loss(run, torch.tensor(2.0))
    near(float(got.detach()), 2.0 + 0.5 * 3.0 * sum(errors) / len(errors))


def test_it_finds_prompts_again_that_lie_in_a_subspace_and_leaves_them_as_they_are() -> None:
    model = build()
    adapter = subspace(model, alpha=200.0, dim=2)
    auto = own(adapter, Autoencoder)
    prompts, base = auto.prompts.clone(), {n: p.clone() for n, p in model.named_parameters() if "adapters" not in n}
    before = float(auto.error().detach())
    result = fit(model, adapter, Batches(mixed(), batch_size=6), eval_batches=Batches(mixed(), batch_size=6),
                 options=TrainOptions(max_steps=60, **(OPTIONS | {"lr": 1e-2})))  # fmt: skip
    assert float(auto.error().detach()) < 0.2 * before and result.proof is not None
    assert torch.equal(auto.prompts, prompts)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_prompts_are_tensors_adapters_or_folders_of_ours_and_pefts(tmp_path: Any) -> None:
    for family in ("llama", "bert"):  # whose files are PEFT's, and ours
        model = build(family)
        plain = dt.attach(model, dt.PromptTuning(length=4), "plain")
        (prompt,) = plain.parameters()
        folder = plain.save(tmp_path / family)
        found = own(autoencoder(model, {"a": prompt, "b": plain, "c": folder, "d": str(folder)}, **SIZE), Autoencoder)
        assert all(torch.equal(p, prompt) for p in found.prompts) and bool(found.given)


def test_autocast_rounds_no_prompt() -> None:
    """Or steps of less than a 256th of a number would show nowhere."""
    model = build()
    made = [own(subspace(model), Autoencoder), own(dt.attach(model, dt.IntrinsicPrompt(length=4, **SIZE)), Decoded)]
    factors = dt.attach(model, dt.MultitaskPrompt(length=4, r=2), "mpt")
    made += [u.source for _, u in factors.units()]
    for source in made:
        with torch.autocast("cpu", torch.bfloat16):
            got = source()
        assert torch.equal(got, source()) and got.dtype == torch.float32


def test_wrong_sources_and_options_are_named() -> None:
    model = build()
    with pytest.raises(dt.DeltatuneError, match=r"shapes \[\(2, 32\), \(4, 32\)\]"):
        autoencoder(model, {"a": torch.zeros(2, 32), "b": torch.zeros(4, 32)})
    with pytest.raises(dt.DeltatuneError, match=r"that of a is \(2, 8\); .* embeds in 32"):
        autoencoder(model, {"a": torch.zeros(2, 8)}, **SIZE)
    with pytest.raises(dt.DeltatuneError, match="a: .* is no adapter of prompt tuning"):
        autoencoder(model, {"a": dt.attach(model, dt.LoRA(), "law")})
    adapter = subspace(model)
    target = dt.attach(model, dt.IntrinsicPrompt(length=4, dim=9, hidden=16), "target")
    with pytest.raises(dt.DeltatuneError, match=r"decoder.0.weight has shape \(16, 9\), its source \(16, 8\)"):
        transfer(target, adapter)
    with pytest.raises(dt.DeltatuneError, match="has no task 'squat'.*'squad'"):
        transfer(target, adapter, "squat")
    with pytest.raises(dt.DeltatuneError, match="3 tasks have no one prompt"):
        dt.flatten(adapter)
    blank = dt.attach(model, dt.IntrinsicSubspace(length=4, tasks=("squad", "mnli"), **SIZE), "blank")
    with pytest.raises(dt.DeltatuneError, match="no tuned prompts to find a subspace of"):
        fit(model, blank, Batches(mixed(), batch_size=6), options=TrainOptions(max_steps=1, **OPTIONS))
    for wrong in ({"dim": 0}, {"hidden": 0}, {"length": 0}, {"alpha": -1}, {"tasks": ("a", "a")}):
        with pytest.raises(dt.DeltatuneError, match=r"^IntrinsicSubspace: "):
            dt.IntrinsicSubspace(**wrong)


def test_interrupted_runs_go_on_with_the_same_decoder(tmp_path: Any) -> None:
    run_on_llama(dt.IntrinsicPrompt(length=4, **SIZE), tmp_path, stop=3)
