"""Which module of which architecture is what: one table of regular expressions, keyed by ``config.model_type``.

Every pattern is meant for ``re.fullmatch`` on a module path and begins with an optional prefix, so it holds for the
bare backbone and under any head class. Sublayer outputs (``o``, ``down``) are projections whose output someone else
adds to the residual, never a module that adds it itself or that holds the norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from deltatune.core.errors import DeltatuneError, nearest
from deltatune.core.select import Fused, Select, register_parts, resolve, walk

Side = Literal["encoder", "decoder"]
Layout = Callable[[Any], tuple[tuple[int, int, int], int]]

_ANY = r"(.*\.)?"
_NORM = rf"{_ANY}(\w*[nN]orm\w*|ln_\w+)"
_LM = r"lm_head|score|classifier|qa_outputs"
_ROBERTA_HEAD = rf"{_ANY}(lm_head\.(dense|decoder)|classifier(\.dense|\.out_proj)?|qa_outputs)"
_WHISPER_HEAD = rf"{_ANY}(proj_out|projector|classifier)"
_CONTIGUOUS: Layout = lambda c: ((1, 1, 1), 1)  # noqa: E731  [q | k | v]
_BY_HEAD: Layout = lambda c: ((1, 1, 1), c.num_attention_heads)  # noqa: E731  [q k v] of head 0, of head 1, ...


@dataclass(frozen=True)
class Anatomy:
    """Patterns of one architecture; None where it has no such module. One may match nothing in some configurations.

    ``attention`` computes attention (and passes itself to the attention function), ``cross_attention`` are those that
    look at an encoder. ``q, k, v`` are None where ``qkv`` is one projection; its output rows are then ``groups``
    repetitions of pieces of relative ``sizes``: ``layout(config) -> (sizes, groups)``. ``gate_up`` is likewise [gate |
    up]. ``mlp`` is None where the block holds ``up`` and ``down`` itself. ``norm`` matches every norm, and
    ``post_norm`` those that end a block, over its last residual sum, where norms follow the sums; None where they
    precede the sublayers. ``head`` matches every linear layer above the backbone. ``backbone`` takes the token ids (or
    pixels, or spectrogram) and runs embeddings and blocks, an encoder-decoder's encoder; where it matches nothing, the
    root is the backbone.
    """

    block: str
    attention: str
    o: str
    down: str
    head: str
    backbone: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    layout: Layout | None = None
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    mlp: str | None = None
    cross_attention: str | None = None
    post_norm: str | None = None
    embedding: str | None = None
    position: str | None = None
    norm: str = _NORM
    encoder: str | None = None
    decoder: str | None = None


_IN_BLOCK = ("attention", "cross_attention", *"qkvo", "qkv", "mlp", "up", "gate", "gate_up", "down", "post_norm")


def _table(block: str, **fields: Any) -> Anatomy:
    """The patterns of ``_IN_BLOCK`` are written relative to the block, the others relative to any prefix."""
    prefix = {name: rf"{_ANY}{block}\." for name in _IN_BLOCK}
    full: dict[str, Any] = {n: v if callable(v) else f"{prefix.get(n, _ANY)}({v})" for n, v in fields.items()}
    return Anatomy(block=f"{_ANY}{block}", **full)


def _falcon(c: Any) -> tuple[tuple[int, int, int], int]:
    if c.new_decoder_architecture:
        return (c.num_attention_heads // c.num_kv_heads, 1, 1), c.num_kv_heads
    return ((c.num_attention_heads, 1, 1), 1) if c.multi_query else _BY_HEAD(c)


_QKV = {x: rf"self_attn\.{x}_proj" for x in "qkv"}
_LLAMA = _table(
    r"layers\.\d+",
    attention="self_attn",
    **_QKV,
    o=r"self_attn\.o_proj",
    mlp="mlp",
    up=r"mlp\.up_proj",
    gate=r"mlp\.gate_proj",
    down=r"mlp\.down_proj",
    embedding="embed_tokens",
    head=_LM,
    backbone="model",
)
_PHI3 = replace(
    _LLAMA,
    q=None,
    k=None,
    v=None,
    up=None,
    gate=None,
    qkv=rf"{_LLAMA.block}\.self_attn\.qkv_proj",
    layout=lambda c: ((c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), 1),
    gate_up=rf"{_LLAMA.block}\.mlp\.gate_up_proj",
)
_PHI = replace(
    _LLAMA,
    o=rf"{_LLAMA.block}\.self_attn\.dense",
    up=rf"{_LLAMA.block}\.mlp\.fc1",
    gate=None,
    down=rf"{_LLAMA.block}\.mlp\.fc2",
)
_GPT2 = _table(
    r"h\.\d+",
    attention="attn|crossattention",
    cross_attention="crossattention",
    qkv=r"attn\.c_attn",
    layout=_CONTIGUOUS,
    o=r"(attn|crossattention)\.c_proj",
    mlp="mlp",
    up=r"mlp\.c_fc",
    down=r"mlp\.c_proj",
    embedding="wte",
    position="wpe",
    head=_LM,
    backbone="transformer",
)
_GPTJ = _table(
    r"h\.\d+",
    attention="attn",
    **{x: rf"attn\.{x}_proj" for x in "qkv"},
    o=r"attn\.out_proj",
    mlp="mlp",
    up=r"mlp\.fc_in",
    down=r"mlp\.fc_out",
    embedding="wte",
    head=_LM,
    backbone="transformer",
)
_NEOX = _table(
    r"layers\.\d+",
    attention="attention",
    qkv=r"attention\.query_key_value",
    layout=_BY_HEAD,
    o=r"attention\.dense",
    mlp="mlp",
    up=r"mlp\.dense_h_to_4h",
    down=r"mlp\.dense_4h_to_h",
    embedding="embed_in",
    head=_LM,
    backbone="gpt_neox",
)
_BLOOM = _table(
    r"h\.\d+",
    attention="self_attention",
    qkv=r"self_attention\.query_key_value",
    layout=_BY_HEAD,
    o=r"self_attention\.dense",
    mlp="mlp",
    up=r"mlp\.dense_h_to_4h",
    down=r"mlp\.dense_4h_to_h",
    embedding="word_embeddings",
    head=_LM,
    backbone="transformer",
)
_OPT = _table(
    r"decoder\.layers\.\d+",
    attention="self_attn",
    **_QKV,
    o=r"self_attn\.out_proj",
    up="fc1",
    down="fc2",
    post_norm="final_layer_norm",
    embedding="embed_tokens",
    position="embed_positions",
    head=_LM,
    backbone="decoder",
)
_BERT = _table(
    r"encoder\.layer\.\d+",
    attention=r"attention\.self",
    **{x[0]: rf"attention\.self\.{x}" for x in ("query", "key", "value")},
    o=r"attention\.output\.dense",
    up=r"intermediate\.dense",
    down=r"output\.dense",
    post_norm=r"output\.LayerNorm",
    embedding=r"embeddings\.word_embeddings",
    position=r"embeddings\.position_embeddings",
    head=r"cls\.predictions\.(transform\.dense|decoder)|cls\.seq_relationship|classifier|qa_outputs",
    backbone="bert",
)
_DEBERTA = replace(
    _BERT,
    q=rf"{_BERT.block}\.attention\.self\.query_proj",
    k=rf"{_BERT.block}\.attention\.self\.key_proj",
    v=rf"{_BERT.block}\.attention\.self\.value_proj",
    # the pooler stands beside this backbone, not in it, and comes untrained
    head=rf"({_BERT.head}|{_ANY}(lm_predictions\.lm_head\.dense|pooler\.dense))",
    backbone=rf"{_ANY}deberta",
)
_DISTILBERT = _table(
    r"transformer\.layer\.\d+",
    attention="attention",
    **{x: rf"attention\.{x}_lin" for x in "qkv"},
    o=r"attention\.out_lin",
    mlp="ffn",
    up=r"ffn\.lin1",
    down=r"ffn\.lin2",
    post_norm="output_layer_norm",
    embedding=r"embeddings\.word_embeddings",
    position=r"embeddings\.position_embeddings",
    head="vocab_transform|vocab_projector|pre_classifier|classifier|qa_outputs",
    backbone="distilbert",
)
_T5 = _table(
    r"(encoder|decoder)\.block\.\d+",
    attention=r"layer\.\d\.(SelfAttention|EncDecAttention)",
    cross_attention=r"layer\.\d\.EncDecAttention",
    **{x: rf"layer\.\d\.(SelfAttention|EncDecAttention)\.{x}" for x in "qkvo"},
    mlp=r"layer\.\d\.DenseReluDense",
    up=r"layer\.\d\.DenseReluDense\.(wi|wi_1)",
    gate=r"layer\.\d\.DenseReluDense\.wi_0",
    down=r"layer\.\d\.DenseReluDense\.wo",
    embedding=r"(encoder|decoder)\.embed_tokens",
    head=r"lm_head|classification_head\.(dense|out_proj)|classifier|qa_outputs",
    backbone="encoder",
    encoder="encoder",
    decoder="decoder",
)
_BART = _table(
    r"(encoder|decoder)\.layers\.\d+",
    attention="self_attn|encoder_attn",
    cross_attention="encoder_attn",
    **{x: rf"(self_attn|encoder_attn)\.{x}_proj" for x in "qkv"},
    o=r"(self_attn|encoder_attn)\.out_proj",
    up="fc1",
    down="fc2",
    post_norm="final_layer_norm",
    embedding=r"(encoder|decoder)\.embed_tokens",
    position=r"(encoder|decoder)\.embed_positions",
    head=r"lm_head|classification_head\.(dense|out_proj)|qa_outputs",
    backbone="encoder",
    encoder="encoder",
    decoder="decoder",
)
_VIT = _table(
    r"layers\.\d+",
    attention="attention",
    **{x: rf"attention\.{x}_proj" for x in "qkvo"},
    mlp="mlp",
    up=r"mlp\.fc1",
    down=r"mlp\.fc2",
    head="classifier",
    backbone="vit",
)
_CLIP = _table(
    r"layers\.\d+",
    attention="self_attn",
    **_QKV,
    o=r"self_attn\.out_proj",
    mlp="mlp",
    up=r"mlp\.fc1",
    down=r"mlp\.fc2",
    embedding="token_embedding",
    position="position_embedding",
    head="visual_projection|text_projection|classifier",
    backbone="text_model",
)

ANATOMY: Mapping[str, Anatomy] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "phi": _PHI,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gptj": _GPTJ,
    "gpt_neox": _NEOX,
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, layout=_falcon),
    "opt": _OPT,
    "bert": _BERT,
    "roberta": replace(_BERT, head=_ROBERTA_HEAD, backbone=rf"{_ANY}roberta"),
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    **dict.fromkeys(("t5", "mt5"), _T5),
    "bart": _BART,
    "whisper": replace(_BART, post_norm=None, embedding=rf"{_ANY}decoder\.embed_tokens", head=_WHISPER_HEAD),
    "vit": _VIT,
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "clip_vision_model": replace(_CLIP, embedding=None),
}


def anatomy(model: nn.Module) -> Anatomy:
    """The patterns of ``model``'s architecture; an unknown one raises ``DeltatuneError`` with the nearest known."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        raise DeltatuneError(
            f"{type(model).__name__} has no config.model_type to know it by; give `targets` explicitly"
        )
    if kind not in ANATOMY:
        raise DeltatuneError(
            f"no parts are known for model type {kind!r} ({type(model).__name__}), only for {', '.join(ANATOMY)}:"
            f" give `targets` explicitly, for example 'all-linear'{nearest(kind, ANATOMY)}"
        )
    return ANATOMY[kind]


def parts(model: nn.Module) -> dict[str, Select]:
    """Part name -> selection, for the parts that ``model`` really has; rows of a fused projection are a ``Fused``."""
    a, paths = anatomy(model), [path for path, _ in walk(model)]
    found: dict[str, Select] = {}
    for name, pattern in vars(a).items():
        if isinstance(pattern, str) and any(re.fullmatch(pattern, path) for path in paths):
            found[name] = pattern if name != "head" else _leaves(pattern, paths)
    if "qkv" in found and a.layout is not None:
        sizes, groups = a.layout(model.config)
        found |= {n: Fused(targets=a.qkv, sizes=sizes, take=(i,), groups=groups) for i, n in enumerate("qkv")}
    if "gate_up" in found:
        found |= {n: Fused(targets=a.gate_up, sizes=(1, 1), take=(i,)) for i, n in enumerate(("gate", "up"))}
    if "post_norm" in found and getattr(model.config, "do_layer_norm_before", False):  # OPT's are of either kind
        del found["post_norm"]
    if "backbone" not in found and (a.embedding is None or "embedding" in found):
        found["backbone"] = ""  # the path of the root
    return found


def classifier(model: nn.Module) -> str | None:
    """Path of the layer that tells classes apart, the last of a classifier's head; None where there is none."""
    head = parts(model).get("head")
    if head is None or getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return None
    path = resolve(model, head)[-1].path
    return path if path.rpartition(".")[2] in ("classifier", "score", "out_proj") else None


def _leaves(pattern: str, paths: list[str]) -> str:
    """``classifier`` may be a linear layer, or a module that holds two: then only these two are meant."""
    hits = [p for p in paths if re.fullmatch(pattern, p)]
    holders = [p for p in hits if any(q.startswith(f"{p}.") for q in hits)]
    return f"(?!({'|'.join(map(re.escape, holders))})$){pattern}" if holders else pattern


def hidden(config: Any) -> int:
    """Width of the residual stream; of the text tower where ``config`` holds two."""
    return int(_text(config).hidden_size)


def layers(config: Any, side: Side = "encoder") -> int:
    """Number of blocks; ``side`` counts only where an encoder and a decoder differ."""
    c = _text(config)
    named = (f"{side}_layers", "num_decoder_layers" if side == "decoder" else "num_layers", "num_hidden_layers")
    return int(next(n for n in (getattr(c, name, None) for name in named) if n is not None))


def heads(config: Any, side: Side = "encoder") -> int:
    """Number of query heads."""
    c = _text(config)
    return int(getattr(c, f"{side}_attention_heads", None) or c.num_attention_heads)


def kv_heads(config: Any, side: Side = "encoder") -> int:
    """Heads of the keys and values that the cache holds: fewer than ``heads`` under grouped or multi-query attention.

    Falcon's new architecture caches them after repeating each for its group, so there it is ``heads``.
    """
    c = _text(config)
    if c.model_type == "falcon":
        return 1 if c.multi_query and not c.new_decoder_architecture else heads(c)
    if hasattr(c, f"{side}_attention_heads"):
        return heads(c, side)
    return int(getattr(c, "num_key_value_heads", None) or heads(c))


def head_dim(config: Any, side: Side = "encoder") -> int:
    """Width of one head: as the configuration says (heads * head_dim need not be ``hidden``), or hidden / heads."""
    c = _text(config)
    return int(getattr(c, "head_dim", None) or hidden(c) // heads(c, side))


def _text(config: Any) -> Any:
    return getattr(config, "text_config", config)


register_parts(parts)
