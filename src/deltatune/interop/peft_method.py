"""PEFT's configurations as methods."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from deltatune.core import Adapter, DeltatuneError, Init, Method, Union
from deltatune.core.errors import nearest
from deltatune.core.select import walk
from deltatune.inits.olora import OLoRA
from deltatune.inits.pissa import PiSSA
from deltatune.interop.peft_config import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    VeraConfig,
)
from deltatune.interop.peft_method_eva import eva
from deltatune.interop.peft_method_lycoris import loha, lokr, start_loha, start_lokr
from deltatune.interop.peft_method_vera import start_vera, vera
from deltatune.interop.peft_targets import (
    ADALORA,
    HEADS,
    IA3_INPUTS,
    IA3_MODULES,
    LORA,
    exactly,
    named_by,
    refuse,
    targeted,
    targets_of,
)
from deltatune.methods.adalora import AdaLoRA
from deltatune.methods.bitfit import BitFit
from deltatune.methods.dora import DoRA
from deltatune.methods.ia3 import IA3
from deltatune.methods.lora import LoRA
from deltatune.methods.p_tuning import PTuning
from deltatune.methods.prefix import PrefixTuning
from deltatune.methods.prompt import PromptTuning
from deltatune.methods.tune import Tune
from deltatune.storage import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalDown(Init):
    """A ~ N(0, 1/r^2), B = 0: PEFT's `init_lora_weights="gaussian"`."""

    def __call__(self, delta: Any, w: Tensor) -> None:
        nn.init.normal_(delta.a, std=1 / len(delta.a))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomUp(Init):
    """B is drawn as A is, so that the adapter does something at once: PEFT's `init_lora_weights=False`, for tests."""

    def __call__(self, delta: Any, w: Tensor) -> None:
        nn.init.kaiming_uniform_(delta.b, a=5**0.5)


def method_of(model: nn.Module, config: PeftConfig) -> Method:
    """The method that `config` describes on `model`. As PEFT does, fills in what the configuration left open: the
    architecture's target modules, the heads of classifiers, the sizes of prompts.

    Raises DeltatuneError for options that are not offered, and for modules that are not there.
    """
    if (heads := HEADS.get(config.task_type)) and hasattr(config, "modules_to_save"):  # type: ignore[call-overload]
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    main = next(build for kind, build in _METHODS if isinstance(config, kind))(model, config)
    parts, bias = [main], getattr(config, "bias", "none")
    saved = _saved(model, getattr(config, "modules_to_save", None))
    if bias != "none":
        near = {path for path, _ in targeted(model, config)} if bias.endswith("_only") else {p for p, _ in walk(model)}
        near -= set(saved)
        found = [p for p, m in walk(model) if p in near and layers.is_layer(m) and getattr(m, "bias", None) is not None]
        parts += [BitFit(targets=exactly(found))] if found else []
    if saved:
        parts.append(Tune(targets=exactly(saved)))
    return main if len(parts) == 1 else Union(methods=tuple(parts))


def _saved(model: nn.Module, names: list[str] | None) -> list[str]:
    """Layers in the modules whose path ends so; those of an encoder without the head that the task suggests: none."""
    if not names:
        return []
    roots = [path for path, _ in walk(model) if path.endswith(tuple(names))]
    inside = [(p, m) for p, m in walk(model) if any(p == r or p.startswith(f"{r}.") for r in roots)]
    return [p for p, m in inside if any(v is not None for v in m._parameters.values())]


_REFUSED = (
    "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora",
    "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying",
)  # fmt: skip
_INITS = ("gaussian", "olora", "pissa", "pissa_niter_4", "eva")
_OWN = {"corda": "CorDA", "lora_ga": "LoRAGA", "loftq": "LoftQ"}  # PEFT's start elsewhere, from data given before


def _init(config: LoraConfig) -> Init | None:
    name = config.init_lora_weights
    if name == "eva":
        return eva(config)
    if name is True or name is None:
        return None
    if name is False:
        return RandomUp()
    if name == "gaussian":
        return NormalDown()
    if name == "olora":
        return OLoRA()
    if found := re.fullmatch(r"pissa(?:_niter_(\d+))?", str(name)):
        return PiSSA(niter=int(found[1]) if found[1] else None)
    if name in _OWN:
        raise DeltatuneError(f"init_lora_weights={name!r} is not offered; attach deltatune.LoRA(init={_OWN[name]}())")
    hint = nearest(str(name), _INITS) or f"; there are {', '.join(_INITS)}"
    raise DeltatuneError(f"init_lora_weights={name!r} is not offered{hint}")


def _lora(model: nn.Module, config: LoraConfig) -> Method:
    refuse(config, *_REFUSED)
    targets, _ = targets_of(model, config, LORA)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    lora = LoRA(
        targets=targets, r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout, ranks=ranks, alphas=alphas,
        scaling="alpha/sqrt(r)" if config.use_rslora else "alpha/r", init=_init(config),
    )  # fmt: skip
    return DoRA(targets=targets, inner=lora) if config.use_dora else lora


def _ia3(model: nn.Module, config: IA3Config) -> Method:
    if not config.init_ia3_weights:
        raise DeltatuneError("IA3Config.init_ia3_weights=False is not offered; leave it out")
    if config.feedforward_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", "custom")
        if kind not in IA3_INPUTS:
            raise DeltatuneError(f"feedforward_modules: no default is known for {kind!r}; name the modules, or give []")
        config.feedforward_modules = set(IA3_INPUTS[kind])
    targets, paths = targets_of(model, config, IA3_MODULES)
    inputs = [p for p in paths if named_by(config.feedforward_modules, p)]
    return IA3(targets=targets, on_input=exactly(inputs) if inputs else None)


def _adalora(model: nn.Module, config: AdaLoraConfig) -> Method:
    refuse(config, *_REFUSED, "use_dora", "use_rslora", "alpha_pattern")
    targets, _ = targets_of(model, config, ADALORA)
    return AdaLoRA(
        targets=targets, target_r=config.target_r, init_r=config.init_r, t_init=config.tinit, t_final=config.tfinal,
        every=config.deltaT, beta1=config.beta1, beta2=config.beta2, alpha=config.lora_alpha,
        orthogonality=config.orth_reg_weight, dropout=config.lora_dropout,
    )  # fmt: skip


def _prompt(model: nn.Module, config: PromptTuningConfig) -> Method:
    init: Any = "vocabulary"
    if config.prompt_tuning_init == PromptTuningInit.TEXT:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **config.tokenizer_kwargs or {})
        init = tuple(tokenizer(config.prompt_tuning_init_text)["input_ids"])
    return PromptTuning(length=_length(config), init=init)


def _prefix(model: nn.Module, config: PrefixTuningConfig) -> Method:
    if config.prefix_projection and config.init_weights:
        raise DeltatuneError(f"PrefixTuningConfig: init_weights={config.init_weights!r} needs prefix_projection=False")
    hidden = config.encoder_hidden_size or _fill(model, config).token_dim
    return PrefixTuning(length=_length(config), hidden=hidden if config.prefix_projection else None)


def _ptuning(model: nn.Module, config: PromptEncoderConfig) -> Method:
    hidden = config.encoder_hidden_size or _fill(model, config).token_dim
    if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
        return PTuning(length=_length(config), encoder="mlp", layers=3, hidden=hidden)
    if config.encoder_dropout:
        raise DeltatuneError(f"PromptEncoderConfig: encoder_dropout={config.encoder_dropout} is not offered; give 0")
    return PTuning(length=_length(config), layers=config.encoder_num_layers, hidden=hidden)


def _fill(model: nn.Module, config: PromptLearningConfig) -> PromptLearningConfig:
    """The sizes that PEFT infers from the model and writes down."""
    own = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator, union-attr]
    for name, source in (("num_layers", "num_hidden_layers"), ("token_dim", "hidden_size"),
                         ("num_attention_heads", "num_attention_heads")):  # fmt: skip
        if getattr(config, name) is None:
            setattr(config, name, getattr(own, source, None))
    return config


def _length(config: PromptLearningConfig) -> int:
    if not config.num_virtual_tokens:
        raise DeltatuneError(f"{type(config).__name__}: give num_virtual_tokens, got {config.num_virtual_tokens}")
    return config.num_virtual_tokens


@torch.no_grad()
def start(adapter: Adapter, config: PeftConfig) -> None:
    """What PEFT starts elsewhere than our methods: random prompts at N(0, 1), prefixes of zeros, and some deltas."""
    if begin := _STARTS.get(type(config)):
        begin(adapter, config)
    for role, p in adapter.roles():
        if role == "prompt" and getattr(config, "prompt_tuning_init", None) == PromptTuningInit.RANDOM:
            p.normal_()
        if getattr(config, "init_weights", None) == "zero":  # without a projection: the prefix is all there is
            p.zero_()


_METHODS: tuple[tuple[type[PeftConfig], Callable[[nn.Module, Any], Method]], ...] = (
    (AdaLoraConfig, _adalora),
    (LoraConfig, _lora),
    (IA3Config, _ia3),
    (VeraConfig, vera),
    (LoHaConfig, loha),
    (LoKrConfig, lokr),
    (PromptTuningConfig, _prompt),
    (PrefixTuningConfig, _prefix),
    (PromptEncoderConfig, _ptuning),
)
_STARTS: dict[type[PeftConfig], Callable[[Adapter, Any], None]] = {
    VeraConfig: start_vera,
    LoHaConfig: start_loha,
    LoKrConfig: start_lokr,
}
