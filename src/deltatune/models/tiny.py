"""Tiny randomly initialised models of every supported family, built in code: for tests, documentation and dry runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from deltatune.core.errors import DeltatuneError, nearest

VOCAB, PAD, BOS, EOS = 99, 0, 1, 2
_STD = 0.15  # times sqrt(hidden 32) is near 1: signals keep their size from layer to layer


@dataclass(frozen=True)
class _Family:
    """``heads`` maps a task to the ``Auto…`` class that builds it."""

    model_type: str
    config: dict[str, Any]
    heads: dict[str, str] = field(default_factory=dict)


_CAUSAL = {
    "lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
}
_NO_TOKENS = {k: v for k, v in _CAUSAL.items() if k != "tokens"}
_MASKED = _CAUSAL | {"lm": "AutoModelForMaskedLM"}
_SEQ2SEQ = _CAUSAL | {"lm": "AutoModelForSeq2SeqLM"}
_IMAGE = {"lm": "AutoModelForImageClassification", "classification": "AutoModelForImageClassification"}

_DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
_TEXT = _DEEP | {"max_position_embeddings": 128}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "decoder_start_token_id": EOS}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 128, "decoder_start_token_id": BOS}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True}
_DEBERTA |= {"norm_rel_ebd": "layer_norm", "position_biased_input": False}  # as DeBERTa-v3 is published

_FAMILIES = {
    "llama": _Family("llama", _GROUPED, _CAUSAL),
    "mistral": _Family("mistral", _GROUPED | {"head_dim": 8}, _CAUSAL),
    "qwen2": _Family("qwen2", _GROUPED, _CAUSAL),
    "qwen3": _Family("qwen3", _GROUPED | {"head_dim": 16}, _CAUSAL),  # heads * head_dim is not hidden, as in 4B
    "gemma": _Family("gemma", _GROUPED | {"head_dim": 8}, _CAUSAL),
    "gemma2": _Family("gemma2", _GEMMA, _CAUSAL),
    "gemma3": _Family("gemma3_text", _GEMMA, _NO_TOKENS),
    "phi": _Family("phi", _TEXT, _CAUSAL),
    "phi3": _Family("phi3", _GROUPED, _CAUSAL),
    "gpt2": _Family("gpt2", _GPT, _CAUSAL),
    "gpt_neox": _Family("gpt_neox", _TEXT, _CAUSAL),
    "gptj": _Family("gptj", _GPT | {"rotary_dim": 4}, _NO_TOKENS),
    "opt": _Family("opt", _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32}, _NO_TOKENS),
    "bloom": _Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, _CAUSAL),
    "falcon": _Family("falcon", _FALCON, _CAUSAL),
    "falcon-new": _Family("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, _CAUSAL),
    "bert": _Family("bert", _TEXT, _MASKED),
    "roberta": _Family("roberta", _TEXT | {"type_vocab_size": 1}, _MASKED),
    "deberta-v2": _Family("deberta-v2", _TEXT | _DEBERTA, _MASKED),
    "distilbert": _Family("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, _MASKED),
    "t5": _Family("t5", _T5, _SEQ2SEQ),
    "mt5": _Family("mt5", _T5 | {"feed_forward_proj": "gated-gelu"}, _SEQ2SEQ),
    "bart": _Family("bart", _BART | {"max_position_embeddings": 128}, _NO_TOKENS | {"lm": "AutoModelForSeq2SeqLM"}),
    "vit": _Family("vit", _DEEP | {"image_size": 16, "patch_size": 8}, _IMAGE),
    "clip": _Family(
        "clip",
        {
            "projection_dim": 16,
            "text_config": _TEXT | {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
            "vision_config": _DEEP | {"image_size": 16, "patch_size": 8},
        },
        _IMAGE | {"lm": "AutoModel"},
    ),
    "whisper": _Family(
        "whisper",
        _BART | _WHISPER,
        {"lm": "AutoModelForSpeechSeq2Seq", "classification": "AutoModelForAudioClassification"},
    ),
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def tiny(family: str, task: str = "lm", **config_overrides: Any) -> PreTrainedModel:
    """A model of ``family``: hidden size 32, 2 layers (BART's, Whisper's decoders 3), 4 heads, 99 tokens, in eval mode.

    ``task`` is ``lm`` (the family's natural head: causal, masked or sequence-to-sequence language model; ViT's
    classifier, CLIP's two towers, Whisper's transcriber), ``classification`` (3 labels) or ``tokens`` (3 labels a
    token). Weights are drawn from torch's global generator, so ``torch.manual_seed`` fixes them; every dropout rate
    is 0 unless overridden.

    Raises ``DeltatuneError`` for an unknown family, or a task that transformers has no head for in that family.
    """
    if family not in _FAMILIES:
        raise DeltatuneError(f"no family {family!r} among {', '.join(FAMILIES)}{nearest(family, FAMILIES)}")
    spec = _FAMILIES[family]
    if task not in spec.heads:
        raise DeltatuneError(f"{family} has no head for task {task!r}; one of {', '.join(spec.heads)}")
    labels = {} if task == "lm" and family != "vit" else {"num_labels": 3}
    tokens = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    settings = ({} if spec.model_type in ("vit", "clip") else tokens) | spec.config | labels | config_overrides
    config = AutoConfig.for_model(spec.model_type, **settings)
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float) and name not in config_overrides:
                setattr(part, name, 0.0)
    if task == "tokens" and "classifier_dropout" not in config_overrides:
        config.classifier_dropout = 0.0  # some heads fall back to 0.1 where the configuration is silent
    model: Any = getattr(transformers, spec.heads[task]).from_config(config)
    _randomise(model)
    model.eval()
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Matrices are redrawn; vectors (biases, norm gains) get noise, so a gain stays near what its class starts from."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            parameter.normal_(std=_STD)
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Valid arguments for ``model``: token ids [batch, length] ending in the end token, without padding; images
    [batch, 3, size, size]; log-mel features [batch, bins, frames]; decoder ids where a decoder has a language head.
    """
    generator = torch.Generator().manual_seed(seed)
    config, accepted = model.config, inspect.signature(model.forward).parameters
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)

    def ids(first: int | None = None, last: int | None = None) -> torch.Tensor:
        drawn = torch.randint(EOS + 1, text.vocab_size, (batch, length), generator=generator)
        if first is not None:
            drawn[:, 0] = first
        if last is not None:
            drawn[:, -1] = last
        return drawn

    result: dict[str, torch.Tensor] = {}
    if "input_ids" in accepted:
        result |= {"input_ids": ids(last=EOS), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    if "pixel_values" in accepted:
        shape = (batch, vision.num_channels, vision.image_size, vision.image_size)
        result["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_features" in accepted:
        frames = 2 * config.max_source_positions  # the encoder's second convolution has stride 2
        result["input_features"] = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
    if config.is_encoder_decoder and model.get_output_embeddings() is not None:  # type: ignore[no-untyped-call]
        result["decoder_input_ids"] = ids(first=config.decoder_start_token_id)
    return result
