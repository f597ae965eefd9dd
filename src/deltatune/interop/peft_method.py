"""PEFT's configurations as methods: which modules PEFT would touch, and what it would do there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from deltatune.core import Adapter, DeltatuneError, Init, Method, Select, Union
from deltatune.core.errors import nearest
from deltatune.core.select import walk
from deltatune.inits.olora import OLoRA
from deltatune.inits.pissa import PiSSA
from deltatune.interop.peft_config import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    Names,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
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

HEADS = {  # trained and saved in full beside the adapter
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def _table(*rows: str) -> dict[str, list[str]]:
    """`modules: architectures` rows -> architecture (`config.model_type`) -> modules."""
    pairs = (row.split(":") for row in rows)
    return {kind: modules.split() for modules, kinds in pairs for kind in kinds.split()}


_LORA = _table(
    "q v: t5 mt5",
    "q_proj v_proj: bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "c_attn: gpt2 gpt_bigcode",
    "query_key_value: bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel",
    "query value: bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj: deberta-v2",
    "in_proj: deberta",
    "q v q_proj v_proj: blip-2",
    "Wqkv: mpt",
    "c_proj c_attn: btlm",
    "qkv_proj: codegen",
    "q_proj v_proj fc1 fc2: phi",
    "q_proj k_proj v_proj o_proj: nemotron_h",
    "key value receptance output: rwkv",
    "r_proj k_proj v_proj o_proj key value: rwkv7",
)
_ADALORA = _table(
    "q_proj v_proj: gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "c_attn: gpt2 gpt_bigcode",
    "query_key_value: bloom gpt_neox",
    "query value: bert",
    "in_proj: deberta",
    "q_proj k_proj v_proj o_proj: nemotron_h",
    "q k v o wi wo: t5",
    "q k v o wi_0 wi_1 wo: mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2: bart opt",
    "query key value dense: roberta",
    "query_proj key_proj value_proj dense: deberta-v2",
)
_IA3 = _table(
    "k v wo: t5",
    "k v wi_1: mt5",
    "c_attn mlp.c_proj: gpt2 gpt_bigcode",
    "query_key_value mlp.dense_4h_to_h: bloom",
    "query_key_value dense_4h_to_h: gpt_neox falcon RefinedWeb RefinedWebModel",
    "key value output.dense: bert roberta",
    "key_proj value_proj output.dense: deberta-v2",
    "in_proj output.dense: deberta",
    "q_proj k_proj fc2: opt",
    "q_proj v_proj fc_out: gptj",
    "q_proj v_proj c_proj: gpt_neo",
    "q_proj v_proj fc2: bart phi",
    "k_proj v_proj down_proj: llama mistral",
    "k_proj v_proj w2: mixtral",
    "q_proj v_proj down_proj: llama4 gemma gemma2 gemma3_text qwen2 qwen3",
)
_IA3_INPUTS = {k: [] if k == "mt5" else v[-1:] for k, v in _IA3.items()}  # the feed-forward projection comes last
_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"


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
        near = {path for path, _ in _targeted(model, config)} if bias == "lora_only" else {p for p, _ in walk(model)}
        near -= set(saved)
        found = [p for p, m in walk(model) if p in near and layers.is_layer(m) and getattr(m, "bias", None) is not None]
        parts += [BitFit(targets=_exactly(found))] if found else []
    if saved:
        parts.append(Tune(targets=_exactly(saved)))
    return main if len(parts) == 1 else Union(methods=tuple(parts))


def _exactly(paths: Iterable[str]) -> str:
    return "|".join(map(re.escape, paths))


def _named(names: Names, path: str) -> bool:
    """PEFT's rule: a pattern is the whole path, a name is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == n or path.endswith(f".{n}") for n in names or ())


def _saved(model: nn.Module, names: list[str] | None) -> list[str]:
    """Layers in the modules whose path ends so; those of an encoder without the head that the task suggests: none."""
    if not names:
        return []
    roots = [path for path, _ in walk(model) if path.endswith(tuple(names))]
    inside = [(p, m) for p, m in walk(model) if any(p == r or p.startswith(f"{r}.") for r in roots)]
    return [p for p, m in inside if any(v is not None for v in m._parameters.values())]


def _targeted(model: nn.Module, config: Any) -> list[tuple[str, nn.Module]]:
    """The modules that PEFT would adapt."""
    kept = [rf"(^|.*\.){m}($|\..*)" for m in config.modules_to_save or ()]
    found = []
    for path, module in walk(model):
        named = _named(config.target_modules, path) and not _named(config.exclude_modules, path)
        if named and not any(re.match(k, path) for k in kept) and _in_layers(config, path):
            if not layers.is_layer(module):
                kind = type(module).__name__
                raise DeltatuneError(f"target {path!r} is a {kind}, which is no linear layer, convolution or embedding")
            found.append((path, module))
    return found


def _in_layers(config: Any, path: str) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == [] or path in config.target_modules:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    lead = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
    number = next((m[1] for p in patterns if (m := re.match(rf"{lead}{p}\.(\d+)\.", path))), None)
    return number is not None and int(number) in ([wanted] if isinstance(wanted, int) else wanted)


def _targets(model: nn.Module, config: Any, usual: dict[str, list[str]]) -> tuple[Select, list[str]]:
    """(selection, paths), with the configuration's own `target_modules` filled in."""
    kind = getattr(getattr(model, "config", None), "model_type", "custom")
    if config.target_modules is None:
        if kind != "gemma4" and kind not in usual:
            near = nearest(kind, usual)
            raise DeltatuneError(f"target_modules: no default is known for {kind!r}{near}; name the modules")
        config.target_modules = _GEMMA4 if kind == "gemma4" else set(usual[kind])
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = _all_linear(model, config)
    found = _targeted(model, config)
    if not found:
        names = sorted({path.rpartition(".")[2] for path, m in walk(model) if layers.is_layer(m)})
        first = next(iter(sorted(config.target_modules)), "") if not isinstance(config.target_modules, str) else ""
        raise DeltatuneError(
            f"target modules {config.target_modules!r} not found in {type(model).__name__}"
            f"{nearest(first, names) or '; it has ' + ', '.join(names[:12])}"
        )
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = all(layers.layer_of(m).transposed for _, m in found)
    paths = [path for path, _ in found]
    if isinstance(config.target_modules, set):
        ends = tuple(sorted(config.target_modules))
        whole = [p for p, _ in walk(model) if _named(config.target_modules, p)] == paths
        if whole and all(re.fullmatch(r"[\w.]+", e) and any(_named({e}, p) for p in paths) for e in ends):
            return ends, paths  # our own rule for names finds the same
    return _exactly(paths), paths


def _all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((m for n in HEADS[TaskType.SEQ_CLS][::-1] if (m := getattr(model, n, None)) is not None), None)
    return {path for path, m in walk(model) if layers.is_linear(m) and m is not head}


_REFUSED = (
    "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora",
    "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora", "arrow_config",
    "kasa_config", "ensure_weight_tying",
)  # fmt: skip
_INITS = ("gaussian", "olora", "pissa", "pissa_niter_4")


def _refuse(config: PeftConfig, *names: str) -> None:
    for name in names:
        if value := getattr(config, name):
            raise DeltatuneError(f"{type(config).__name__}.{name}={value!r} is not offered; leave it out")


def _init(name: bool | str) -> Init | None:
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
    hint = nearest(str(name), _INITS) or f"; there are {', '.join(_INITS)}"
    raise DeltatuneError(f"init_lora_weights={name!r} is not offered{hint}")


def _lora(model: nn.Module, config: LoraConfig) -> Method:
    _refuse(config, *_REFUSED)
    targets, _ = _targets(model, config, _LORA)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    lora = LoRA(
        targets=targets, r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout, ranks=ranks, alphas=alphas,
        scaling="alpha/sqrt(r)" if config.use_rslora else "alpha/r", init=_init(config.init_lora_weights),
    )  # fmt: skip
    return DoRA(targets=targets, inner=lora) if config.use_dora else lora


def _ia3(model: nn.Module, config: IA3Config) -> Method:
    if not config.init_ia3_weights:
        raise DeltatuneError("IA3Config.init_ia3_weights=False is not offered; leave it out")
    if config.feedforward_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", "custom")
        if kind not in _IA3_INPUTS:
            raise DeltatuneError(f"feedforward_modules: no default is known for {kind!r}; name the modules, or give []")
        config.feedforward_modules = set(_IA3_INPUTS[kind])
    targets, paths = _targets(model, config, _IA3)
    inputs = [p for p in paths if _named(config.feedforward_modules, p)]
    return IA3(targets=targets, on_input=_exactly(inputs) if inputs else None)


def _adalora(model: nn.Module, config: AdaLoraConfig) -> Method:
    _refuse(config, *_REFUSED, "use_dora", "use_rslora", "alpha_pattern")
    targets, _ = _targets(model, config, _ADALORA)
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
    """What PEFT starts elsewhere than our methods: random prompts at N(0, 1), prefixes of zeros."""
    for role, p in adapter.roles():
        if role == "prompt" and getattr(config, "prompt_tuning_init", None) == PromptTuningInit.RANDOM:
            p.normal_()
        if getattr(config, "init_weights", None) == "zero":  # without a projection: the prefix is all there is
            p.zero_()


_METHODS: tuple[tuple[type[PeftConfig], Callable[[nn.Module, Any], Method]], ...] = (
    (AdaLoraConfig, _adalora),
    (LoraConfig, _lora),
    (IA3Config, _ia3),
    (PromptTuningConfig, _prompt),
    (PrefixTuningConfig, _prefix),
    (PromptEncoderConfig, _ptuning),
)
