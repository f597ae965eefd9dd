"""PEFT 0.21.2's files, `adapter_config.json` and `adapter_model.safetensors`, written and read.

An adapter is written in this layout when it can be expressed there exactly, so that PEFT computes the same outputs:

    LoRA, rsLoRA, DoRA      rows of fused projections become whole modules of higher rank, and so do initialisations
                            that take a constant product off the base (PiSSA, OLoRA)
    IA3, AdaLoRA            and prompt tuning, P-tuning (what its encoder makes), prefix tuning
    OFT, COFT, OFTv2, BOFT  on linear layers, rotations alone where PEFT has no learned magnitude
    VeRA                    with `save_projection`, as PEFT cannot draw A and B from our seed
    LoHa, LoKr              on layers that store (out, in); LoHa's rows of fused projections as LoRA's
    Union(…, Tune(…))       `modules_to_save`; trained biases become LoRA's `bias="all"`

Other adapters keep the library's own layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from deltatune.core import Adapter, DeltatuneError, Method
from deltatune.core.adapter import Written, register_encoder
from deltatune.core.checkpoint import register_decoder
from deltatune.core.errors import nearest
from deltatune.interop.peft_format_adalora import decode_adalora, encode_adalora
from deltatune.interop.peft_format_common import (
    PREFIX,
    WRAPPER,
    Kind,
    Placed,
    Stored,
    Tensors,
    assemble,
    common_fields,
    task_of,
)
from deltatune.interop.peft_format_ia3 import decode_ia3, encode_ia3
from deltatune.interop.peft_format_lora import DEFAULTS, decode_lora, encode_lora
from deltatune.interop.peft_format_lycoris import LOHA, LOKR
from deltatune.interop.peft_format_oft import (
    BOFT_DEFAULTS,
    OFT_DEFAULTS,
    decode_boft,
    decode_oft,
    encode_boft,
    encode_oft,
)
from deltatune.interop.peft_format_prompt import DEFAULTS as PROMPT_DEFAULTS
from deltatune.interop.peft_format_prompt import decode_prefix, decode_prompt, encode_prefix, encode_prompt
from deltatune.interop.peft_format_saved import copies_of, decode_saved, encode_saved
from deltatune.interop.peft_format_vera import VERA
from deltatune.methods.adalora import AdaLoRA
from deltatune.methods.bitfit import BitFit
from deltatune.methods.boft import BOFT
from deltatune.methods.coft import COFT
from deltatune.methods.dora import DoRA
from deltatune.methods.ia3 import IA3
from deltatune.methods.lora import LoRA
from deltatune.methods.oft import OFT
from deltatune.methods.oft_v2 import OFTv2
from deltatune.methods.p_tuning import PTuning
from deltatune.methods.prefix import PrefixTuning
from deltatune.methods.prompt import PromptTuning
from deltatune.methods.tune import Copy, Tune, head_of
from deltatune.models.prefixing import Positions

_KINDS = (
    Kind("LORA", (LoRA, DoRA), encode_lora, decode_lora, DEFAULTS),
    Kind("IA3", (IA3,), encode_ia3, decode_ia3, dict.fromkeys(("feedforward_modules", "init_ia3_weights"))),
    Kind("ADALORA", (AdaLoRA,), encode_adalora, decode_adalora, dict.fromkeys(
        ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"))),
    Kind("OFT", (OFT, COFT, OFTv2), encode_oft, decode_oft, OFT_DEFAULTS),
    Kind("BOFT", (BOFT,), encode_boft, decode_boft, BOFT_DEFAULTS),
    VERA,
    LOHA,
    LOKR,
    Kind("PROMPT_TUNING", (PromptTuning,), encode_prompt, decode_prompt, PROMPT_DEFAULTS | dict.fromkeys(
        ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"))),
    Kind("P_TUNING", (PTuning,), encode_prompt, decode_prompt, dict.fromkeys(
        ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"))),
    Kind("PREFIX_TUNING", (PrefixTuning,), encode_prefix, decode_prefix, {"prefix_projection": False}),
)  # fmt: skip
_ENCODE = {cls: kind for kind in _KINDS for cls in kind.methods}
_DECODE = {kind.name: kind.decode for kind in _KINDS}
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # PEFT wraps the base once for these, and twice for others
_AUXILIARY = (Tune, BitFit, Positions)
_KNOWN = {name for kind in _KINDS for name in kind.fields} | {
    "auto_mapping", "base_model_name_or_path", "deltatune", "inference_mode", "peft_type", "peft_version", "revision",
    "task_type", "runtime_config", "token_indices", "init_weights",
}  # fmt: skip


def encode(adapter: Adapter) -> Written | None:
    """(configuration, tensors) of the adapter as PEFT writes them; None if it cannot be expressed there."""
    parts = adapter.method.parts()
    main = [p for p in parts if type(p) not in _AUXILIARY]
    if len({type(p) for p in main}) != 1 or type(main[0]) not in _ENCODE:
        return None
    kind = _ENCODE[type(main[0])]
    places, extras = _places(adapter)
    if not places or (written := kind.encode(adapter.model, main, places)) is None:
        return None
    if (copies := copies_of(extras)) is None:
        return None
    fields, tensors = written
    adapted = {p.path for p in places}
    task, prompt = task_of(adapter.model), kind.name in _PROMPTS
    saved = encode_saved(adapter.model, copies, adapted, task, biases="bias" in fields, by_task=prompt)
    if saved is None:
        return None
    beside, more, task = saved
    config = common_fields(adapter.model, kind.name, task) | fields | beside
    if prompt:
        return config, tensors | {f"{WRAPPER}{name}": t for name, t in more.items()}
    every = {**tensors, **more}
    return config, {f"{WRAPPER if name in kind.wide else PREFIX}{name}": t for name, t in every.items()}


def _places(adapter: Adapter) -> tuple[list[Placed], list[Placed]]:
    """The units by module: those of the method itself, and the copies of `Tune` and `BitFit`."""
    main: dict[str, Placed] = {}
    extra: dict[str, Placed] = {}
    for path, module, unit, at in adapter.sites():
        into = extra if type(getattr(unit, "inner", unit)) is Copy else main
        into.setdefault(path, Placed(path, module, [])).units.append((unit, at))
    return list(main.values()), list(extra.values())


def decode(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Method, Tensors]:
    """The method and its tensors, by our names, of what PEFT or `encode` wrote.

    The modules are those that the tensors name. Raises DeltatuneError for a `peft_type` or a field that changes the
    outputs in a way that is not read; warns of fields that PEFT 0.21.2 does not have.
    """
    kind = str(config.get("peft_type") or "")
    if kind not in (*_DECODE, "TRAINABLE_TOKENS"):
        known = ", ".join(sorted(_DECODE))
        hint = nearest(kind, _DECODE)
        raise DeltatuneError(f"adapter_config.json: peft_type {kind!r} is not read{hint} (read: {known})")
    if strange := [k for k, v in config.items() if k not in _KNOWN and v]:
        warnings.warn(f"adapter_config.json: PEFT 0.21.2 has no {', '.join(strange)}; read without", stacklevel=3)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if config.get("ensure_weight_tying") and tied:
        raise DeltatuneError(
            "adapter_config.json: ensure_weight_tying = True on a base with tied embeddings is not supported"
        )
    if labels := config.get("deltatune", {}).get("labels"):
        head_of(model, tuple(labels))
    stored = Stored(model, tensors, WRAPPER if kind in _PROMPTS else PREFIX)
    main = [_DECODE[kind](model, config, stored)] if kind in _DECODE else []
    inside, beside = decode_saved(model, config, stored)
    return assemble([*inside, *main, *beside])


register_encoder(encode)
register_decoder(decode)
