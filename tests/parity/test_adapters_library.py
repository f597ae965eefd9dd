"""Adapters that the package `adapters` saved, read: its logits, which `adapters_library.py` wrote beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import adapters_library as library
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltatune as dt
from deltatune.core import DeltatuneError
from deltatune.interop.adapters import load

HERE = Path(__file__).parent / "adapters_saved"
CASES = [(kind, what) for kind, kinds in library.KINDS.items() for what in kinds]
METHODS = {
    "houlsby": "Houlsby", "pfeiffer": "Pfeiffer", "parallel": "ParallelAdapter", "compacter": "Compacter",
    "prefix": "PrefixTuning", "unipelt": "UniPELT", "lora": "LoRA", "ia3": "IA3", "fusion": "AdapterFusion",
    "mam": "Union", "phm": "PHMAdapter", "compacter++": "CompacterAfterSum", "left": "Pfeiffer",
}  # fmt: skip


def base(kind):
    model = library.base(kind)
    left = model.load_state_dict(load_file(HERE / kind / "base.safetensors"), strict=False)
    assert not left.unexpected_keys
    model.tie_weights()
    return model


def outputs(kind):
    return load_file(HERE / kind / "outputs.safetensors")


def folder(kind, what):
    return HERE / kind / what.replace("+", "p")


@torch.no_grad()
def logits(model, kind):
    given = {k: t for k, t in outputs(kind).items() if k.endswith("input_ids")}
    return model.eval()(**given).logits


@pytest.mark.parametrize("kind", library.BASES)
def test_the_base_is_the_one_that_the_adapters_were_saved_for(kind):
    torch.testing.assert_close(logits(base(kind), kind), outputs(kind)["base"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, what", CASES)
def test_an_adapter_gives_the_logits_that_the_package_computes(kind, what, tmp_path):
    model, theirs = base(kind), outputs(kind)
    adapter = dt.load(model, folder(kind, what))
    assert adapter.name == what.replace("+", "p").replace("fusion", "+".join(library.FUSED))
    torch.testing.assert_close(logits(model, kind), theirs[what], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs[what], theirs["base"], atol=1e-2)
    adapter.save(tmp_path)  # in our own layout, or in PEFT's
    again = base(kind)
    dt.load(again, tmp_path)
    torch.testing.assert_close(logits(again, kind), theirs[what], atol=1e-5, rtol=1e-5)


def test_the_methods_are_those_of_the_papers():
    for what in library.KINDS["bert"]:
        adapter = load(base("bert"), folder("bert", what), "mine")
        name = METHODS[what.partition("-")[0]]
        assert adapter.name == "mine" and type(adapter.method).__name__ == name, what


def edited(kind, what, to, change):
    """A copy of a saved adapter with another configuration."""
    shutil.copytree(folder(kind, what), to)
    file = next(to.glob("adapter*_config.json"))
    config = json.loads(file.read_text())
    change(config["config"])
    file.write_text(json.dumps(config))
    return to


REFUSED = [
    ("houlsby", {"non_linearity": "tanh"}, "non_linearity = 'tanh'"),
    ("pfeiffer", {"non_linearity": "leakyrelu"}, "non_linearity = 'leakyrelu'"),
    ("pfeiffer", {"original_ln_after": False}, "original_ln_after = False"),
    ("pfeiffer", {"residual_before_ln": False}, "residual_before_ln = False"),
    ("pfeiffer", {"residual_before_ln": "post_add"}, "residual_before_ln = 'post_add'"),
    ("pfeiffer", {"adapter_residual_before_ln": True}, "adapter_residual_before_ln = True"),
    ("houlsby", {"ln_before": True}, "ln_before = True"),
    ("houlsby", {"ln_after": True}, "ln_after = True"),
    ("houlsby", {"inv_adapter": "nice"}, "inv_adapter = 'nice'"),
    ("houlsby", {"cross_adapter": True}, "cross_adapter = True"),
    ("houlsby", {"use_gating": True}, "use_gating = True"),
    ("houlsby", {"is_parallel": True}, "is_parallel = True"),
    ("houlsby", {"mh_adapter": False}, "after attention sublayers"),
    ("houlsby", {"unheard_of": 3}, "unheard_of = 3"),
    ("compacter", {"shared_W_phm": True}, "shared_W_phm = True"),
    ("compacter", {"factorized_phm_rule": True}, "factorized_phm_rule = True"),
    ("compacter", {"shared_phm_rule": False}, "shared_phm_rule = False"),
    ("compacter", {"phm_bias": False}, "phm_bias = False"),
    ("compacter", {"scaling": 2.0}, "scaling = 2.0"),
    ("prefix", {"non_linearity": "relu"}, "non_linearity = 'relu'"),
    ("prefix", {"use_gating": True}, "use_gating = True"),
    ("prefix", {"prefix_length": 4}, "prefix"),
    ("lora", {"use_dora": True}, "use_dora = True"),
    ("lora", {"vera_d": 0.1}, "vera_d = 0.1"),
    ("lora", {"composition_mode": "multiply"}, "composition_mode = 'multiply'"),
    ("lora", {"architecture": "reft"}, "architecture 'reft'"),
    ("fusion", {"query_before_ln": True}, "query_before_ln = True"),
    ("fusion", {"temperature": True}, "temperature = True"),
]


@pytest.mark.parametrize("what, fields, told", REFUSED)
def test_a_field_that_changes_the_outputs_is_refused_by_name_and_value(what, fields, told, tmp_path):
    model = base("bert")
    changed = edited("bert", what, tmp_path / what, lambda config: config.update(fields))
    before = logits(model, "bert")
    with pytest.raises(DeltatuneError, match=told):
        dt.load(model, changed)
    assert torch.equal(logits(model, "bert"), before) and not dt.core.adapters(model)


def test_an_unknown_activation_is_refused():
    for method in (dt.Houlsby, dt.Compacter):
        with pytest.raises(DeltatuneError, match=f"{method.__name__}: activation='swish' is not one of gelu_tanh"):
            method(activation="swish")


def test_unipelt_of_a_decoder_is_refused(tmp_path):
    changed = edited("bert", "unipelt", tmp_path / "unipelt", lambda config: None)
    file = changed / "adapter_config.json"
    file.write_text(file.read_text().replace('"model_type": "bert"', '"model_type": "gpt2"'))
    with pytest.raises(DeltatuneError, match="use_gating = True of a gpt2"):
        dt.load(base("gpt2"), changed)


def test_what_the_package_does_otherwise_on_t5_is_refused(tmp_path):
    changed = edited("bert", "prefix", tmp_path / "prefix", lambda config: None)
    file = changed / "adapter_config.json"
    file.write_text(file.read_text().replace('"model_type": "bert"', '"model_type": "t5"'))
    with pytest.raises(DeltatuneError, match="prefix in relative positions"):
        dt.load(base("t5"), changed)
    shutil.copytree(folder("t5", "compacter"), tmp_path / "compacter")
    tensors = tmp_path / "compacter/adapter.safetensors"
    save_file({n: t for n, t in load_file(tensors).items() if "phm_rule" not in n}, tensors)
    with pytest.raises(DeltatuneError, match="holds no phm_rule"):
        dt.load(base("t5"), tmp_path / "compacter")


def test_pickles_are_refused_with_the_remedy(tmp_path):
    shutil.copytree(folder("bert", "prefix"), tmp_path / "p")
    (tmp_path / "p/adapter.safetensors").rename(tmp_path / "p/pytorch_adapter.bin")
    with pytest.raises(DeltatuneError, match="need unpickling.*weights_only=True"):
        dt.load(base("bert"), tmp_path / "p")
    (tmp_path / "p/pytorch_adapter.bin").unlink()
    with pytest.raises(DeltatuneError, match="adapter.safetensors is missing"):
        dt.load(base("bert"), tmp_path / "p")


def test_another_base_and_other_folders_are_refused(tmp_path):
    with pytest.raises(DeltatuneError, match="'bert', and this model is a 'gpt2'"):
        load(base("gpt2"), folder("bert", "houlsby"))
    dt.attach(base("bert"), dt.LoRA(), "own").save(tmp_path)
    with pytest.raises(DeltatuneError, match="no adapter_config.json .* of the package"):
        load(base("bert"), tmp_path)


def test_a_fusion_takes_adapters_on_the_model_before_those_beside_it(tmp_path):
    shutil.copytree(folder("bert", "fusion"), tmp_path / "fusion")
    with pytest.raises(DeltatuneError, match="adapter 'one' is neither on the model nor in"):
        dt.load(base("bert"), tmp_path / "fusion")
    model = base("bert")
    for name in library.FUSED:
        dt.load(model, folder("bert", name))
    dt.load(model, tmp_path / "fusion", "both")
    torch.testing.assert_close(logits(model, "bert"), outputs("bert")["fusion"], atol=1e-5, rtol=1e-5)


def test_an_adapter_of_the_backbone_fits_the_model_with_a_head(tmp_path):
    shutil.copytree(folder("bert", "mam"), tmp_path / "mam")
    file = tmp_path / "mam/adapter.safetensors"
    save_file({name.removeprefix("bert."): t for name, t in load_file(file).items()}, file)
    model = base("bert")
    dt.load(model, tmp_path / "mam")
    torch.testing.assert_close(logits(model, "bert"), outputs("bert")["mam"], atol=1e-5, rtol=1e-5)


def test_a_head_saved_beside_the_adapter_comes_with_it(tmp_path):
    shutil.copytree(folder("bert", "pfeiffer"), tmp_path / "p")
    model = base("bert")
    dense = model.cls.predictions.transform.dense
    head = {
        "cls.predictions.transform.dense.weight": dense.weight + 1,
        "cls.predictions.bias": model.cls.predictions.bias,
    }
    save_file({n: t.detach().clone() for n, t in head.items()}, tmp_path / "p/model_head.safetensors")
    dt.load(model, tmp_path / "p")
    assert not torch.allclose(logits(model, "bert"), outputs("bert")["pfeiffer"], atol=1e-2)
    with torch.no_grad():
        dense.weight += 1
    dt.detach(model, "pfeiffer")
    dt.load(model, folder("bert", "pfeiffer"))
    changed = logits(model, "bert")
    with torch.no_grad():
        dense.weight -= 1
    dt.detach(model, "pfeiffer")
    dt.load(model, tmp_path / "p")
    torch.testing.assert_close(logits(model, "bert"), changed, atol=1e-5, rtol=1e-5)
    save_file({"heads.pfeiffer.1.weight": torch.ones(3, 8)}, tmp_path / "p/model_head.safetensors")
    with pytest.raises(DeltatuneError, match="'heads.pfeiffer.1.weight' is no part of BertForMaskedLM"):
        dt.load(base("bert"), tmp_path / "p")
