"""Which modules of a model PEFT would touch: its tables of defaults, and its rules for names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltatune.core import DeltatuneError, Select
from deltatune.core.errors import nearest
from deltatune.core.select import walk
from deltatune.interop.peft_config import Names, PeftConfig, TaskType
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


LORA = _table(
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
VERA = LORA | {"phi": ["q_proj", "v_proj"]}
ADALORA = _table(
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
IA3_MODULES = _table(
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
IA3_INPUTS = {k: [] if k == "mt5" else v[-1:] for k, v in IA3_MODULES.items()}  # the feed-forward projection comes last
_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"


def exactly(paths: Iterable[str]) -> str:
    return "|".join(map(re.escape, paths))


def named_by(names: Names, path: str) -> bool:
    """PEFT's rule: a pattern is the whole path, a name is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == n or path.endswith(f".{n}") for n in names or ())


def targeted(model: nn.Module, config: Any) -> list[tuple[str, nn.Module]]:
    """The modules that PEFT would adapt."""
    kept = [rf"(^|.*\.){m}($|\..*)" for m in config.modules_to_save or ()]
    found = []
    for path, module in walk(model):
        named = named_by(config.target_modules, path) and not named_by(getattr(config, "exclude_modules", None), path)
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


def targets_of(model: nn.Module, config: Any, usual: dict[str, list[str]]) -> tuple[Select, list[str]]:
    """(selection, paths), with the configuration's own `target_modules` filled in."""
    kind = getattr(getattr(model, "config", None), "model_type", "custom")
    if config.target_modules is None:
        if kind != "gemma4" and kind not in usual:
            near = nearest(kind, usual)
            raise DeltatuneError(f"target_modules: no default is known for {kind!r}{near}; name the modules")
        config.target_modules = _GEMMA4 if kind == "gemma4" else set(usual[kind])
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = _all_linear(model, config)
    found = targeted(model, config)
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
        whole = [p for p, _ in walk(model) if named_by(config.target_modules, p)] == paths
        if whole and all(re.fullmatch(r"[\w.]+", e) and any(named_by({e}, p) for p in paths) for e in ends):
            return ends, paths  # our own rule for names finds the same
    return exactly(paths), paths


def _all_linear(model: nn.Module, config: PeftConfig) -> set[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None and config.task_type == TaskType.SEQ_CLS:
        head = next((m for n in HEADS[TaskType.SEQ_CLS][::-1] if (m := getattr(model, n, None)) is not None), None)
    return {path for path, m in walk(model) if layers.is_linear(m) and m is not head}


def refuse(config: PeftConfig, *names: str) -> None:
    for name in names:
        if value := getattr(config, name):
            raise DeltatuneError(f"{type(config).__name__}.{name}={value!r} is not offered; leave it out")
