"""Prompt tuning, P-tuning and prefix tuning in PEFT's layout: one tensor, `prompt_embeddings`, and no key prefix.

PEFT holds a prefix in the cache, so the tokens' positions begin at its length p; here they keep those that they have
without it. Under rotary positions both are one model: (R(i + p) q) k = (R(i) q) (R(p)' k), so that keys are turned back
by p when they are read, and forward when they are written. Elsewhere (learned positions, relative biases, windows) the
outputs would differ, and such prefixes are refused.

A file that we wrote says what the method was, and is read as that. Of a network that made the vectors PEFT's tensor has
the result alone, so such a method comes back without its network (`PrefixTuning(hidden=None)`, `PTuning(encoder=None)`)
and trains on from the vectors, with the rest of its options, such as dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Method, Site, resolve
from deltatune.core.units import ATTENTION
from deltatune.interop.peft_format_common import Fields, Piece, Placed, Stored, Tensors, task_of
from deltatune.methods.p_tuning import PTuning
from deltatune.methods.prefix import Prefix, PrefixTuning
from deltatune.methods.prompt import CrossMask, Prompt, PromptTuning
from deltatune.models import anatomy
from deltatune.models.prompting import layout

EMBEDDINGS = "prompt_embeddings"
DEFAULTS: Fields = {
    "modules_to_save": None, "num_attention_heads": None, "num_layers": None, "num_transformer_submodules": 1,
    "num_virtual_tokens": None, "token_dim": None,
}  # fmt: skip
_STATIC_ROPE = ("default", "linear", "llama3")  # whose frequencies do not depend on the length


def encode_prompt(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    units = [u for p in places for u, _ in p.units if type(u) is not CrossMask]
    if len(units) != 1 or type(units[0]) is not Prompt or units[0].at.after or task_of(model) in (None, "QUESTION_ANS"):
        return None
    with torch.no_grad():
        prompt, config = units[0].vectors(), model.config
    fields = DEFAULTS | {
        "num_attention_heads": anatomy.heads(config),
        "num_layers": anatomy.layers(config),
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
    }
    return fields | _about(parts[0], prompt.shape[1]), {EMBEDDINGS: prompt}


def _about(method: Method, d: int) -> Fields:
    """Where a prompt came from, which PEFT writes down and needs no more."""
    if not isinstance(method, PTuning):
        names = ("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")
        return {"prompt_tuning_init": "RANDOM"} | dict.fromkeys(names)
    return {
        "encoder_reparameterization_type": "LSTM" if method.encoder == "lstm" else "MLP",
        "encoder_hidden_size": method.hidden or (d // 2 if method.encoder == "lstm" else d),
        "encoder_num_layers": method.layers if method.encoder == "lstm" else 2,
        "encoder_dropout": 0.0,
    }


def decode_prompt(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    p = config.get("num_virtual_tokens")
    rows = _embeddings(stored)
    if not p or len(rows) not in (p, 2 * p):  # the second half, a decoder's, PEFT writes and does not use
        raise DeltatuneError(f"{EMBEDDINGS} has {len(rows)} rows, but num_virtual_tokens = {p}")
    encoded = config["peft_type"] == "P_TUNING"
    plain = PTuning(length=p, encoder=None) if encoded else PromptTuning(length=p, init="uniform")
    method = _own(config, plain)
    match = resolve(model, method.select(model), method.usual)[0]
    if layout(Site(model, match.path, match.module, "call")).after:
        raise DeltatuneError(
            f"{config['peft_type']}: PEFT puts a prompt before [CLS], which {type(model).__name__} then no longer "
            "finds at its first place; here prompts follow it, so the outputs would differ"
        )
    return Piece(method, [(match.path, {"prompt": rows[:p]})])


def encode_prefix(model: nn.Module, parts: Sequence[Method], places: Sequence[Placed]) -> tuple[Fields, Tensors] | None:
    units = [u for p in places for u, at in p.units if at == ATTENTION]
    frequencies = _frequencies(model)
    if isinstance(frequencies, str) or task_of(model) != "CAUSAL_LM" or len(units) != anatomy.layers(model.config):
        return None
    if not all(type(u) is Prefix for u in units):
        return None
    with torch.no_grad():
        pairs = [u.source() for u in units]  # type: ignore[operator]
        heads, p, dim = pairs[0][0].shape
        both = torch.stack([t for k, v in pairs for t in (_turned(k, frequencies, p), v)])  # (2 layers, heads, p, dim)
    fields = DEFAULTS | {
        "encoder_hidden_size": None,
        "init_weights": None,
        "num_attention_heads": heads,
        "num_layers": len(units),
        "num_virtual_tokens": p,
        "prefix_projection": False,
        "token_dim": heads * dim,
    }
    return fields, {EMBEDDINGS: both.permute(2, 0, 1, 3).flatten(1)}


def decode_prefix(model: nn.Module, config: Mapping[str, Any], stored: Stored) -> Piece:
    rows = _embeddings(stored)
    if isinstance(frequencies := _frequencies(model), str):
        raise DeltatuneError(f"PREFIX_TUNING: PEFT's prefix moves the tokens' positions, and {frequencies}")
    p, heads, dim = len(rows), anatomy.kv_heads(model.config), anatomy.head_dim(model.config)
    method = _own(config, PrefixTuning(length=p))
    paths = [m.path for m in resolve(model, method.select(model), method.usual)]
    if rows.shape[1] != 2 * len(paths) * heads * dim:
        raise DeltatuneError(
            f"{EMBEDDINGS} has shape {tuple(rows.shape)}; {len(paths)} layers of {heads} key-value heads of width "
            f"{dim} take rows of {2 * len(paths) * heads * dim}"
        )
    both = rows.unflatten(1, (2 * len(paths), heads, dim)).permute(1, 2, 0, 3)
    units: list[tuple[str, Tensors]] = [
        (path, {"source.k": _turned(both[2 * i], frequencies, -p), "source.v": both[2 * i + 1]})
        for i, path in enumerate(paths)
    ]
    return Piece(method, units)


def _own(config: Mapping[str, Any], plain: Any) -> Any:
    """The method that our own section of the file describes, as long as the tensor is; `plain` if there is none."""
    whole = config.get("deltatune", {}).get("method")
    parts = () if whole is None else Method.from_dict(whole).parts()
    own = next((part.flat() for part in parts if type(part) is type(plain)), plain)
    return replace(own, length=plain.length)


def _embeddings(stored: Stored) -> Tensor:
    if EMBEDDINGS not in stored.left:
        raise DeltatuneError(f"the file holds no {EMBEDDINGS}")
    return stored.left.pop(EMBEDDINGS)


def _frequencies(model: Any) -> Tensor | str:
    """The angles that a position turns pairs of features by; or why a shift of positions cannot be taken back."""
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        return f"those of {type(model).__name__} are not rotary alike in all layers, so the outputs would differ"
    if getattr(model.config, "sliding_window", None):
        return f"the attention of {type(model).__name__} is windowed, so the outputs would differ"
    if (kind := getattr(found[0], "rope_type", "default")) not in _STATIC_ROPE:
        return f"its rotary positions ({kind}) depend on the length, so the outputs would differ"
    return found[0].inv_freq


def _turned(k: Tensor, frequencies: Tensor, by: int) -> Tensor:
    """Keys (heads, p, dim) turned by `by` positions; the first 2 len(frequencies) features are turned, in halves."""
    angle = (by * frequencies.double()).to(k.device)
    n = len(angle)
    x, y, rest = k[..., :n].double(), k[..., n : 2 * n].double(), k[..., 2 * n :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([(x * cos - y * sin).to(k.dtype), (y * cos + x * sin).to(k.dtype), rest], -1)
