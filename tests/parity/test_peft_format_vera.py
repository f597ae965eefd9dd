"""VeRA in PEFT's layout, both ways: outputs against PEFT 0.21.2 itself."""

import warnings

import peft
import pytest
import torch
from peft import VeraConfig
from peft_pairs import (
    base,
    close,
    config_of,
    edit,
    from_peft,
    outputs,
    perturb,
    save_peft,
    saved,
    tensors_of,
    write_tensors,
)
from torch import nn

import deltatune as dt
from deltatune.interop.peft_format_vera import drawn
from deltatune.models.tiny import inputs

METHODS = {
    "attention": lambda: dt.VeRA(r=8, targets=dt.Part("q", "v"), save_projection=True),
    "sizes apart": lambda: dt.VeRA(r=5, targets="all-linear", save_projection=True, seed=3, dropout=0.1),
    "head": lambda: dt.Union(methods=(dt.VeRA(r=8, targets="all-linear", save_projection=True), dt.Tune())),
}
FAMILIES = ["llama", "gpt2", "t5"]
CASES = [(f, m) for f in FAMILIES for m in METHODS if (f, m) != ("gpt2", "attention")]


@pytest.mark.parametrize("family,name", CASES)
def test_peft_computes_what_we_wrote(family, name, tmp_path):
    net = base(family)
    given = inputs(net)
    want, plain = saved(net, METHODS[name](), tmp_path / "a")
    assert config_of(tmp_path / "a")["fan_in_fan_out"] is (family == "gpt2")
    theirs = from_peft(base(family), tmp_path / "a")
    close(outputs(theirs, given), want)
    ours = base(family)
    adapter = dt.load(ours, tmp_path / "a")
    close(outputs(ours, given), want)
    made, again = (next(p for p in m.parts() if type(p) is dt.VeRA) for m in (METHODS[name](), adapter.method))
    assert (again.r, again.dropout, again.d_initial) == (made.r, made.dropout, made.d_initial)
    dt.detach(ours)
    close(outputs(ours, given), plain, atol=0)
    theirs.save_pretrained(tmp_path / "b")
    dt.load(ours, tmp_path / "b")
    close(outputs(ours, given), want)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_trained_biases_are_saved_too(family, tmp_path):
    net = base(family)
    given = inputs(net)
    vera = dt.VeRA(r=4, targets="all-linear", save_projection=True)
    want, _ = saved(net, dt.Union(methods=(vera, dt.BitFit())), tmp_path)
    assert config_of(tmp_path)["bias"] == "all"
    close(outputs(from_peft(base(family), tmp_path), given), want)
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), want)


TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "t5": ["q", "v", "wo"]}
CONFIGS = {
    "defaults": lambda f: VeraConfig(target_modules=TARGETS[f]),
    "small": lambda f: VeraConfig(target_modules=TARGETS[f], r=6, d_initial=0.3, projection_prng_key=7),
    "from the key": lambda f: VeraConfig(target_modules=TARGETS[f], r=6, save_projection=False, projection_prng_key=7),
    "all-linear": lambda f: VeraConfig(target_modules="all-linear", r=4, vera_dropout=0.2),
    "one layer": lambda f: VeraConfig(target_modules=TARGETS[f], r=4, layers_to_transform=[1]),
    "biases": lambda f: VeraConfig(target_modules=TARGETS[f], r=4, bias="all"),
    "its biases": lambda f: VeraConfig(target_modules=TARGETS[f], r=4, bias="vera_only"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_peft_wrote(family, name, tmp_path):
    net = base(family)
    given = inputs(net)
    config = CONFIGS[name](family)
    _, want = save_peft(net, config, tmp_path)
    again = base(family)
    assert (outputs(again, given) - want).abs().max() > 1e-3
    adapter = dt.load(again, tmp_path)
    close(outputs(again, given), want)
    method = next(p for p in adapter.method.parts() if type(p) is dt.VeRA)
    assert (method.r, method.d_initial, method.dropout) == (config.r, config.d_initial, config.vera_dropout)
    adapter.save(tmp_path / "back")
    close(outputs(from_peft(base(family), tmp_path / "back"), given), want)
    if "biases" not in name:
        found = tensors_of(tmp_path / "back")
        assert found.keys() >= tensors_of(tmp_path).keys()
        assert all(torch.equal(found[key], t) for key, t in tensors_of(tmp_path).items())


def test_the_key_draws_what_peft_draws():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = VeraConfig(target_modules=["q_proj", "down_proj"], r=5, projection_prng_key=11)
        model = peft.get_peft_model(base("llama"), config).base_model
    a, b = drawn(11, 5, *(model.vera_B["default"].shape[0], model.vera_A["default"].shape[1]))
    assert torch.equal(a, model.vera_A["default"]) and torch.equal(b, model.vera_B["default"])


def test_the_configuration_has_the_fields_and_tensors_that_peft_writes(tmp_path):
    method = dt.VeRA(r=4, targets="q_proj", save_projection=True)
    dt.attach(base("llama"), method).save(tmp_path / "ours")
    save_peft(base("llama"), VeraConfig(target_modules=["q_proj"], r=4), tmp_path / "theirs")
    ours, theirs = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert ours.keys() - {"deltatune"} == theirs.keys()
    assert {k: v for k, v in theirs.items() if ours[k] != v}.keys() <= {
        "target_modules", "task_type", "auto_mapping", "base_model_name_or_path"
    }  # fmt: skip
    shapes = [{k: t.shape for k, t in tensors_of(tmp_path / who).items()} for who in ("ours", "theirs")]
    assert shapes[0] == shapes[1]


OURS = {
    "a seed": ("llama", dt.VeRA(r=4)),
    "rows of a fused projection": ("bloom", dt.VeRA(r=4, targets=dt.Part("q"), save_projection=True)),
    "an embedding": ("llama", dt.VeRA(r=4, targets=dt.Part("embedding"), save_projection=True)),
    "two pairs": ("llama", dt.Union(methods=tuple(
        dt.VeRA(r=4, targets=dt.Part(p), save_projection=True, seed=i) for i, p in enumerate("qv")))),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_what_peft_cannot_express_keeps_our_layout(name, tmp_path):
    family, method = OURS[name]
    net = base(family)
    given = inputs(net)
    adapter = dt.attach(net, method)
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "deltatune"
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), outputs(net, given), atol=0)


def test_a_pair_larger_than_the_modules_need(tmp_path):
    """Of an adapter added beside one that had larger modules."""
    _, want = save_peft(base("llama"), VeraConfig(target_modules=["q_proj"], r=4), tmp_path)
    tensors = tensors_of(tmp_path)
    a, b = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    more = {"base_model.vera_A": torch.cat([a, a], 1), "base_model.vera_B": torch.cat([b, b])}
    write_tensors(tmp_path, tensors | more)
    net = base("llama")
    dt.load(net, tmp_path)
    close(outputs(net, inputs(net)), want)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED = {
    "no A": ({"base_model.vera_A": None}, "vera_A is missing although save_projection is True"),
    "no B": ({"base_model.vera_B": None}, "vera_B is missing"),
    "another rank": ({"base_model.vera_A": torch.zeros(5, 32)}, r"vera_A has shape \(5, 32\)"),
    "too small": ({"base_model.vera_B": torch.zeros(31, 4)}, r"vera_B \(31, 4\).*another base"),
    "no d": ({f"{LAYER}.vera_lambda_d": None}, "vera_lambda_d is missing"),
    "a short d": ({f"{LAYER}.vera_lambda_d": torch.zeros(3)}, "has 3 entries, not r = 4"),
    "a short b": ({f"{LAYER}.vera_lambda_b": torch.zeros(3)}, "has shape"),
    "strange": ({f"{LAYER}.vera_lambda_e": torch.zeros(3)}, "vera_lambda_e"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name, tmp_path):
    change, words = DAMAGED[name]
    save_peft(base("llama"), VeraConfig(target_modules=["q_proj"], r=4), tmp_path)
    write_tensors(tmp_path, {k: t for k, t in (tensors_of(tmp_path) | change).items() if t is not None})
    net = base("llama")
    with pytest.raises(dt.DeltatuneError, match=words):
        dt.load(net, tmp_path)
    assert not dt.adapters(net)


def test_convolutions_are_refused(tmp_path):
    save_peft(base("llama"), VeraConfig(target_modules=["q_proj"], r=4), tmp_path)
    tensors = tensors_of(tmp_path)
    own = {k.replace(LAYER, "base_model.model.0"): t for k, t in tensors.items() if LAYER in k or "vera_A" in k}
    write_tensors(tmp_path, own)
    with pytest.raises(dt.DeltatuneError, match="of a Conv2d is not supported"):
        dt.load(nn.Sequential(nn.Conv2d(4, 3, 2)), tmp_path)


@pytest.mark.parametrize("field", [{"projection_prng_key": 8}, {"r": 5}])
def test_a_wrong_field_is_seen(field, tmp_path):
    config = VeraConfig(target_modules=["q_proj"], r=4, save_projection=False, projection_prng_key=7)
    _, want = save_peft(base("llama"), config, tmp_path)
    edit(tmp_path, **field)
    net = base("llama")
    with pytest.raises((AssertionError, dt.DeltatuneError)):
        dt.load(net, tmp_path)
        close(outputs(net, inputs(net)), want)
