"""Prompts and prefixes in PEFT's layout, both directions. PEFT returns the prompt's logits as well."""

import warnings

import peft
import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft_pairs import base, close, config_of, from_peft, outputs, perturb, saved, tensors_of, write_tensors

import deltatune as dt
from deltatune.models.tiny import inputs

TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bloom": "CAUSAL_LM", "opt": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
ROTARY = ["llama", "qwen2", "qwen3", "phi", "gemma", "gpt_neox"]
P = 3


def _peft(family, config, folder, task="lm"):
    net = base(family, task)
    given = inputs(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).eval()
        perturb((p for p in model.parameters() if p.requires_grad), 0.5)
        model.save_pretrained(folder)
    return outputs(model, given)


def _tokens(logits, n):
    return logits[:, -n:] if logits.ndim == 3 else logits


@pytest.mark.parametrize("family", TASK)
def test_prompts_that_we_wrote(family, tmp_path):
    net = base(family)
    given = inputs(net)
    want, _ = saved(net, dt.PromptTuning(length=P), tmp_path)
    theirs = from_peft(base(family), tmp_path)
    close(_tokens(outputs(theirs, given), want.shape[1]), want)
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), want)


@pytest.mark.parametrize("family", TASK)
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig], ids=["prompt", "p-tuning"])
def test_prompts_that_peft_wrote(family, kind, tmp_path):
    more = {"encoder_hidden_size": 16} if kind is PromptEncoderConfig else {}
    want = _peft(family, kind(task_type=TASK[family], num_virtual_tokens=P, **more), tmp_path)
    net = base(family)
    given = inputs(net)
    plain = outputs(net, given)
    dt.load(net, tmp_path)
    got = outputs(net, given)
    assert (got - plain).abs().max() > 1e-3
    close(got, _tokens(want, got.shape[1]))


@pytest.mark.parametrize(("method", "read"), [
    (dt.PromptTuning(length=P, init=(5, 17)), dt.PromptTuning(length=P, init=(5, 17))),
    (dt.PTuning(length=P, encoder=None), dt.PTuning(length=P, encoder=None)),
    (dt.PTuning(length=P, layers=3, hidden=6), dt.PTuning(length=P, layers=3, hidden=6, encoder=None)),
    (dt.PrefixTuning(length=P, dropout=0.1), dt.PrefixTuning(length=P, dropout=0.1)),
    (dt.PrefixTuning(length=P, dropout=0.1, hidden=4), dt.PrefixTuning(length=P, dropout=0.1)),
    (dt.PrefixTuning(length=P, targets="self_attn"), dt.PrefixTuning(length=P, targets="self_attn")),
], ids=str)  # fmt: skip
def test_what_we_wrote_comes_back_as_the_method_that_it_was(method, read, tmp_path):
    """But for the network that made the vectors, of which PEFT's tensor has none; what PEFT writes is PEFT's."""
    net = base("llama")
    want, _ = saved(net, method, tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "peft"
    again = base("llama")
    adapter = dt.load(again, tmp_path)
    close(outputs(again, inputs(net)), want, atol=2e-5)
    assert adapter.method == read
    if isinstance(method, dt.PrefixTuning) and method.dropout:
        assert {u.dropout.p for _, u in adapter.units() if hasattr(u, "dropout")} == {0.1}
    from_peft(base("llama"), tmp_path).save_pretrained(tmp_path / "theirs")
    assert type(dt.load(base("llama"), tmp_path / "theirs").method) is type(method)


@pytest.mark.parametrize("tuned", [False, True])
def test_a_prompt_and_a_classifier(tuned, tmp_path):
    prompt = dt.PromptTuning(length=P)
    net = base("llama", "classification")
    given = inputs(net)
    want, _ = saved(net, dt.Union(methods=(prompt, dt.Tune())) if tuned else prompt, tmp_path / "ours")
    theirs = from_peft(base("llama", "classification"), tmp_path / "ours")
    close(outputs(theirs, given), want)
    theirs.save_pretrained(tmp_path / "theirs")
    again = base("llama", "classification")
    dt.load(again, tmp_path / "theirs")
    close(outputs(again, given), want)


def test_a_prompt_before_cls_is_another_model(tmp_path):
    _peft("bert", PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P), tmp_path / "theirs", "classification")
    net = base("bert", "classification")
    with pytest.raises(dt.DeltatuneError, match="CLS"):
        dt.load(net, tmp_path / "theirs")
    dt.attach(net, dt.PromptTuning(length=P)).save(tmp_path / "ours")
    assert config_of(tmp_path / "ours")["deltatune"]["tensors"] == "deltatune"


@pytest.mark.parametrize("family", ROTARY)
def test_prefixes_that_we_wrote(family, tmp_path):
    net = base(family)
    given = inputs(net)
    want, _ = saved(net, dt.PrefixTuning(length=P), tmp_path)
    close(outputs(from_peft(base(family), tmp_path), given), want, atol=2e-5)
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), want, atol=2e-5)


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_that_peft_wrote(family, projected, tmp_path):
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projected, encoder_hidden_size=16
    )
    want = _peft(family, config, tmp_path)
    net = base(family)
    given = inputs(net)
    plain = outputs(net, given)
    dt.load(net, tmp_path)
    got = outputs(net, given)
    assert (got - plain).abs().max() > 1e-2
    close(got, want, atol=2e-5)


def test_a_prefix_that_is_not_turned_back_is_seen(tmp_path):
    """The positions' shift matters: reading the keys as they are gives other outputs."""
    want = _peft("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P), tmp_path)
    net = base("llama")
    adapter = dt.load(net, tmp_path)
    rows = tensors_of(tmp_path)["prompt_embeddings"].unflatten(1, (4, 2, 8)).permute(1, 2, 0, 3)
    with torch.no_grad():
        for i, (_, unit) in enumerate(u for u in adapter.units() if getattr(u[1], "source", None)):
            unit.source.k.copy_(rows[2 * i])
    assert (outputs(net, inputs(net)) - want).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral"])
def test_prefixes_whose_positions_cannot_be_taken_back(family, tmp_path):
    _peft(family, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P), tmp_path / "theirs")
    net = base(family)
    with pytest.raises(dt.DeltatuneError, match="outputs would differ"):
        dt.load(net, tmp_path / "theirs")
    dt.attach(net, dt.PrefixTuning(length=P)).save(tmp_path / "ours")
    assert config_of(tmp_path / "ours")["deltatune"]["tensors"] == "deltatune"


def test_the_fields_are_those_that_peft_writes(tmp_path):
    for method, config in (
        (dt.PromptTuning(length=P), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)),
        (dt.PrefixTuning(length=P), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)),
    ):
        dt.attach(base("llama"), method).save(tmp_path / "ours")
        _peft("llama", config, tmp_path / "theirs")
        ours, theirs = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
        assert ours.keys() - {"deltatune"} == theirs.keys()
        for name in ("num_attention_heads", "num_layers", "token_dim", "num_virtual_tokens", "task_type"):
            assert ours[name] == theirs[name]
        assert {k: t.shape for k, t in tensors_of(tmp_path / "ours").items()} == {
            k: t.shape for k, t in tensors_of(tmp_path / "theirs").items()
        }


def test_shapes_that_do_not_fit(tmp_path):
    cases = (dt.PromptTuning(length=P), "num_virtual_tokens"), (dt.PrefixTuning(length=P), "rows of 64")
    for method, message in cases:
        dt.attach(base("llama"), method).save(tmp_path)
        tensors = tensors_of(tmp_path)
        write_tensors(tmp_path, {k: t[:2, :30] for k, t in tensors.items()})
        with pytest.raises(dt.DeltatuneError, match=message):
            dt.load(base("llama"), tmp_path)
        write_tensors(tmp_path, {"other": torch.zeros(2)})
        with pytest.raises(dt.DeltatuneError, match="prompt_embeddings"):
            dt.load(base("llama"), tmp_path)
