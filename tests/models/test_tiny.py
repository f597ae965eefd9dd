from __future__ import annotations

import pytest
import torch

from deltatune.core.errors import DeltatuneError
from deltatune.models.tiny import _FAMILIES, FAMILIES, inputs, tiny

BUILDS = [(family, task) for family in FAMILIES for task in _FAMILIES[family].heads]
GENERATIVE = [f for f in FAMILIES if _FAMILIES[f].heads["lm"] in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")]


def build(family: str, task: str = "lm", seed: int = 0, **overrides):
    torch.manual_seed(seed)
    return tiny(family, task, **overrides)


@torch.no_grad()
def first(model, **kwargs) -> torch.Tensor:
    output = model(**inputs(model, **kwargs))
    return next(output[k] for k in ("logits", "logits_per_image") if k in output)


@pytest.mark.parametrize(("family", "task"), BUILDS)
def test_every_build_runs_and_is_fixed_by_the_seed(family, task):
    model = build(family, task)
    logits = first(model)
    assert not model.training and logits.isfinite().all()
    assert logits.std() > 0.1  # far from degenerate
    assert torch.equal(logits, first(build(family, task)))
    assert not torch.equal(logits, first(build(family, task, seed=1)))
    assert torch.equal(logits, first(model.train()))  # no dropout
    text = getattr(model.config, "text_config", model.config)
    if family != "vit":
        assert (text.pad_token_id, text.vocab_size) == (0, 99)


@pytest.mark.parametrize(("family", "task"), BUILDS)
def test_no_weight_is_degenerate(family, task):
    for name, p in build(family, task).named_parameters():
        if p.ndim and p.numel() > 3:  # a bias of a head with 3 labels is noise around 0 as well
            assert 0.03 < p.std() < 0.75, name


def test_shapes_follow_the_task():
    assert first(build("llama"), batch=3, length=5).shape == (3, 5, 99)
    assert first(build("bert", "tokens"), batch=3, length=5).shape == (3, 5, 3)
    assert first(build("t5", "classification")).shape == (2, 3)
    assert first(build("vit")).shape == (2, 3)
    assert first(build("clip")).shape == (2, 2)
    assert first(build("whisper"), length=4).shape == (2, 4, 99)


def test_inputs_follow_the_seed_and_end_with_the_end_token():
    model = build("bart", "classification")
    ids = inputs(model)["input_ids"]
    assert (ids[:, -1] == model.config.eos_token_id).all() and (ids == model.config.eos_token_id).sum() == 2
    assert torch.equal(ids, inputs(model)["input_ids"])
    assert not torch.equal(ids, inputs(model, seed=1)["input_ids"])


def test_inputs_do_not_touch_the_global_generator():
    model = build("vit")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    inputs(model)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", GENERATIVE)
def test_language_models_generate(family):
    model = build(family)
    batch = {k: v for k, v in inputs(model, length=4).items() if not k.startswith("decoder")}
    start = 1 if model.config.is_encoder_decoder else 4
    out = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (2, start + 3)


def test_overrides_reach_the_configuration():
    assert build("llama", num_hidden_layers=4).config.num_hidden_layers == 4
    assert len(build("gemma3", num_hidden_layers=4).config.layer_types) == 4  # what follows from it follows too
    assert len(build("gpt2", n_layer=1).transformer.h) == 1
    assert build("bert", hidden_dropout_prob=0.5).config.hidden_dropout_prob == 0.5


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(DeltatuneError, match="did you mean 'mistral'"):
        tiny("mistrall")
    with pytest.raises(DeltatuneError, match="opt has no head for task 'tokens'; one of lm, classification"):
        tiny("opt", "tokens")
