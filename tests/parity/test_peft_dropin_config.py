"""The drop-in's configurations: the same fields and defaults as PEFT's, the same modules, the same outputs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants

from deltatune.core import DeltatuneError
from deltatune.interop import peft as dropin
from deltatune.models.tiny import FAMILIES, inputs, tiny

PROMPTS = ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
CONFIGS = ["LoraConfig", "AdaLoraConfig", "IA3Config", "VeraConfig", "LoHaConfig", "LoKrConfig", *PROMPTS]
NEEDED = {"AdaLoraConfig": {"total_step": 10}}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _both(name: str, **options: Any) -> tuple[Any, Any]:
    return getattr(dropin, name)(**options), getattr(peft, name)(**options)


def _out(model: Any) -> torch.Tensor:
    out = model(**inputs(model))
    return out.logits if hasattr(out, "logits") else out[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_and_defaults(name: str) -> None:
    ours, theirs = _both(name, **NEEDED.get(name, {}))
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    want = {k: v for k, v in theirs.to_dict().items() if k != "runtime_config"}
    assert ours.to_dict() == want
    assert ours.is_prompt_learning == theirs.is_prompt_learning


@pytest.mark.parametrize("kind", ["TaskType", "PromptTuningInit", "PromptEncoderReparameterizationType"])
def test_names(kind: str) -> None:
    assert {m.value for m in getattr(dropin, kind)} == {m.value for m in getattr(peft, kind)}
    assert {m.value for m in dropin.PeftType} < {m.value for m in peft.PeftType}
    assert f"{dropin.TaskType.CAUSAL_LM}" == dropin.TaskType.CAUSAL_LM == "CAUSAL_LM"


@pytest.mark.parametrize("function", ["get_peft_model", "get_peft_model_state_dict", "prepare_model_for_kbit_training"])
def test_signatures(function: str) -> None:
    ours = inspect.signature(getattr(dropin, function)).parameters
    for name, theirs in inspect.signature(getattr(peft, function)).parameters.items():
        if name in ours:
            assert ours[name].default == theirs.default, name
        else:
            assert any(p.kind is p.VAR_KEYWORD for p in ours.values()), name


def _targets(model: Any, config: Any, package: Any) -> set[tuple[str, int]]:
    """(module, number of parameters trained there)."""
    adapted = package.get_peft_model(model, config)
    found: dict[str, int] = {}
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            path = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for mark in (".adapters.", ".lora_", ".ia3_", ".base_layer"):
                path = path.split(mark)[0]
            path = path.removesuffix(".bias").removesuffix(".weight")
            found[path] = found.get(path, 0) + p.numel()
    return set(found.items())


@pytest.mark.parametrize("name", ["LoraConfig", "AdaLoraConfig", "IA3Config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets(family: str, name: str) -> None:
    model = tiny(family)
    ours, theirs = _both(name, **NEEDED.get(name, {}))
    try:
        want = _targets(copy.deepcopy(model), theirs, peft)
    except ValueError:
        with pytest.raises(DeltatuneError, match="no default is known"):
            dropin.get_peft_model(model, ours)
        assert not isinstance(model, dropin.PeftModel) and not hasattr(model, "peft_config")
        return
    assert _targets(model, ours, dropin) == want
    assert set(ours.target_modules) == set(theirs.target_modules)
    assert ours.fan_in_fan_out == theirs.fan_in_fan_out


def test_tables_name_the_same_architectures() -> None:
    from deltatune.interop import peft_targets

    pairs = [
        ("LORA", constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        ("LORA", constants.TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING),
        ("LORA", constants.TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING),
        ("VERA", constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING),
        ("ADALORA", constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING),
        ("IA3_MODULES", constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
        ("IA3_INPUTS", constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING),
    ]
    for ours, theirs in pairs:
        assert getattr(peft_targets, ours) == {k: v for k, v in theirs.items() if k != "gemma4"}, ours


SELECTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "list": ("llama", "lm", {"target_modules": ["q_proj", "down_proj"]}),
    "one of them absent": ("llama", "lm", {"target_modules": ["q_proj", "query"]}),
    "suffix with a dot": ("gpt2", "lm", {"target_modules": ["mlp.c_proj"]}),
    "full name": ("llama", "lm", {"target_modules": ["model.layers.1.self_attn.v_proj"]}),
    "regex": ("llama", "lm", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "all-linear": ("llama", "lm", {"target_modules": "all-linear"}),
    "all-linear, any case": ("gpt2", "lm", {"target_modules": "All-Linear"}),
    "all-linear of a classifier": ("llama", "classification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "all-linear without a task": ("bert", "classification", {"target_modules": "all-linear"}),
    "all but": ("llama", "lm", {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "0.mlp.up_proj"]}),
    "all but a regex": ("llama", "lm", {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}),
    "blocks": ("llama", "lm", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "a block": ("gpt2", "lm", {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "h"}),
    "embedding": ("llama", "lm", {"target_modules": ["embed_tokens", "v_proj"]}),
    "saved": ("llama", "lm", {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved block": ("llama", "lm", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "sequence head": ("bert", "classification", {"task_type": "SEQ_CLS"}),
    "token head": ("roberta", "tokens", {"task_type": "TOKEN_CLS"}),
    "two-layer head": ("distilbert", "classification", {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]}),
    "score": ("gpt2", "classification", {"task_type": "SEQ_CLS"}),
    "lora_only": ("gpt2", "lm", {"bias": "lora_only"}),
    "lora_only without biases": ("llama", "lm", {"bias": "lora_only"}),
    "all biases": ("gpt2", "lm", {"bias": "all"}),
    "ranks": ("llama", "lm", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r".*\.mlp\..*": 3}}),
    "dora": ("llama", "lm", {"use_dora": True}),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_selections(case: str) -> None:
    family, task, options = SELECTIONS[case]
    model = tiny(family, task)
    ours, theirs = _both("LoraConfig", **copy.deepcopy(options))
    assert _targets(copy.deepcopy(model), ours, dropin) == _targets(model, theirs, peft)


def test_ia3_feedforward() -> None:
    options: dict[str, Any] = {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]}
    model = tiny("llama")
    ours, theirs = _both("IA3Config", **options)
    assert _targets(copy.deepcopy(model), ours, dropin) == _targets(model, theirs, peft)


OUTPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"r": 2, "lora_alpha": 3, "alpha_pattern": {"1.self_attn.q_proj": 32}, "rank_pattern": {"v_proj": 5}},
    "rslora": {"r": 4, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_same_output_from_the_same_tensors(case: str) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    ours, theirs = _both("LoraConfig", task_type="CAUSAL_LM", **copy.deepcopy(OUTPUTS[case]))
    theirs = peft.get_peft_model(copy.deepcopy(model), theirs)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    before = _out(model)
    tensors = peft.get_peft_model_state_dict(theirs)
    ours = dropin.get_peft_model(model, ours)
    mine = dropin.get_peft_model_state_dict(ours)
    # PEFT adds the whole of an adapted embedding
    adapters_own = {k: v.shape for k, v in tensors.items() if "base_layer" not in k}
    assert {k: v.shape for k, v in mine.items()} == adapters_own
    dropin.set_peft_model_state_dict(ours, tensors)
    torch.testing.assert_close(_out(ours), _out(theirs.eval()), rtol=1e-5, atol=1e-5)
    assert (_out(ours) - before).abs().max() > 1e-2
    for key, value in dropin.get_peft_model_state_dict(ours).items():
        assert torch.equal(value, tensors[key]), key


@pytest.mark.parametrize("init", [True, False, "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_initialisations(init: bool | str) -> None:
    """The product that PEFT starts from, or the distribution; and the base's outputs, unless B is drawn at random."""
    torch.manual_seed(0)
    model = tiny("llama")
    before = _out(model)
    ours, theirs = _both("LoraConfig", r=4, init_lora_weights=init, target_modules=["q_proj", "down_proj"])
    ref = peft.get_peft_model(copy.deepcopy(model), theirs)
    ours = dropin.get_peft_model(model, ours)
    if init is False:
        assert (_out(ours) - before).abs().max() > 1e-3
    else:
        torch.testing.assert_close(_out(ours), before, rtol=1e-4, atol=1e-4)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        unit: Any = ours.get_submodule(path).adapters.units["default"][0]
        layer = ref.base_model.model.get_submodule(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if init in ("pissa", "olora"):
            torch.testing.assert_close(unit.b @ unit.a, b @ a, rtol=1e-4, atol=1e-4)
        elif init == "pissa_niter_4":  # both are random; the paper wants the nearest product, and ours is as near
            w = model.get_submodule(path).weight
            assert (w - 2 * unit.b @ unit.a).norm() < 1.01 * (w - 2 * b @ a).norm() < w.norm()
        else:
            assert unit.a.std().item() == pytest.approx(a.std().item(), rel=0.3)
            assert unit.b.std().item() == pytest.approx(b.std().item(), rel=0.3, abs=1e-9)


REFUSED: dict[str, Any] = {
    "megatron_config": {"a": 1}, "trainable_token_indices": [1], "velora_config": {}, "alora_invocation_tokens": [1],
    "use_qalora": True, "monteclora_config": {"num_samples": 2}, "layer_replication": [(0, 2)], "lora_bias": True,
    "target_parameters": ["x"], "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1}, "kasa_config": {"beta": 1},
    "ensure_weight_tying": True, "init_lora_weights": "corda",
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_refuses_what_it_lacks(field: str) -> None:
    value = REFUSED[field] or {"num_groups": 8}
    model = tiny("llama")
    with pytest.raises(DeltatuneError, match=field):
        dropin.get_peft_model(model, dropin.LoraConfig(**{field: value}))
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, "not found"),  # a string is a pattern of the whole path, as in PEFT
        ({"target_modules": ["self_attn"]}, "LlamaAttention"),
        ({"init_lora_weights": "gausian"}, "did you mean 'gaussian'"),
        ({"init_lora_weights": "lora_ga"}, r"attach deltatune.LoRA\(init=LoRAGA\(\)\)"),
    ],
)
def test_names_the_remedy(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DeltatuneError, match=words):
        dropin.get_peft_model(tiny("llama"), dropin.LoraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"task_type": "CAUSAL"},
        {"bias": "some"},
        {"target_modules": "q.*", "layers_to_transform": [0]},
        {"target_modules": ["q"], "layers_pattern": "h"},
    ],
)
def test_wrong_configurations(options: dict[str, Any]) -> None:
    with pytest.raises(DeltatuneError):
        dropin.LoraConfig(**options)
    if "bias" not in options:
        with pytest.raises(ValueError):
            peft.LoraConfig(**options)


def test_configuration_files(tmp_path: Any) -> None:
    config = dropin.LoraConfig(r=3, target_modules=["v", "q"], task_type="SEQ_2_SEQ_LM", rank_pattern={"q": 2})
    config.save_pretrained(tmp_path)
    again = dropin.PeftConfig.from_pretrained(tmp_path)
    assert again == config and isinstance(again, dropin.LoraConfig)
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert theirs.r == 3 and theirs.target_modules == {"q", "v"}
    theirs.save_pretrained(tmp_path / "theirs")
    assert dropin.PeftConfig.from_pretrained(tmp_path / "theirs") == config
    with pytest.raises(DeltatuneError, match=r"adapter_config\.json"):
        dropin.PeftConfig.from_pretrained(tmp_path / "nowhere")
