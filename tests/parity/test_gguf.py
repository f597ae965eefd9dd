"""GGUF adapters read back by the gguf package, rearranged to Hugging Face's layout by transformers' GGUF reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers.modeling_gguf_pytorch_utils import BloomTensorProcessor, LlamaTensorProcessor

from deltatune.core import Adapter, DeltatuneError, Layers, Part, Union, attach
from deltatune.interop.gguf import ARCHITECTURES, write_gguf
from deltatune.methods.bitfit import BitFit
from deltatune.methods.ia3 import IA3
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny
from deltatune.storage.layers import read

Tensors = dict[str, np.ndarray]


def adapted(family: str, method: object, **overrides: object) -> Adapter:
    torch.manual_seed(0)
    adapter = attach(tiny(family, **overrides), method)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    return adapter


def back(path: Path) -> tuple[dict[str, object], Tensors]:
    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


def change(fields: dict[str, object], tensors: Tensors, name: str) -> np.ndarray:
    """llama.cpp's equation for what is added to the matrix `name`."""
    a, b = tensors[f"{name}.lora_a"].astype(np.float64), tensors[f"{name}.lora_b"].astype(np.float64)
    product = a @ b.T if name.startswith("token_embd") else b @ a
    return fields["adapter.lora.alpha"] / b.shape[1] * product  # type: ignore[operator]


def expected(adapter: Adapter, path: str) -> np.ndarray:
    """W' - W in float64, from the method's equation."""
    total = 0.0
    for p, module, unit, _ in adapter.sites():
        if p == path:
            w = read(module, "weight").detach().double()
            total = total + (unit.double().weight(w) - w).detach().numpy()  # type: ignore[operator]
    return np.asarray(total)


def test_llama_file_gives_back_the_delta_once_transformers_has_undone_the_rotary_layout(tmp_path: Path) -> None:
    adapter = adapted("llama", LoRA(r=4, alpha=12, ranks={"down_proj": 2}))
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert len(tensors) == 2 * 7 * 2
    assert tensors["blk.0.attn_q.weight.lora_a"].shape == (4, 32)
    assert tensors["blk.1.attn_k.weight.lora_b"].shape == (16, 4)
    config = adapter.model.config
    undo = LlamaTensorProcessor(
        {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    )
    names = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for i in range(2):
        for theirs, ours in names.items():
            name = f"blk.{i}.{theirs}.weight"
            got = undo.process(change(fields, tensors, name), name=name).weights
            np.testing.assert_allclose(got, expected(adapter, f"model.layers.{i}.{ours}"), rtol=0, atol=1e-5)


def test_the_layout_matters(tmp_path: Path) -> None:
    """Without the rearrangement q would be another matrix: the check above can fail."""
    adapter = adapted("llama", LoRA(r=4))
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    q, v = (f"blk.0.attn_{x}.weight" for x in "qv")
    assert np.abs(change(fields, tensors, q) - expected(adapter, "model.layers.0.self_attn.q_proj")).max() > 0.1
    np.testing.assert_allclose(
        change(fields, tensors, v), expected(adapter, "model.layers.0.self_attn.v_proj"), atol=1e-5
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2"])
def test_families_whose_rows_stay(family: str, tmp_path: Path) -> None:
    adapter = adapted(family, LoRA(r=2))
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    names = gguf.get_tensor_name_map(ARCHITECTURES[adapter.model.config.model_type], 2)
    paths = {path for path, *_ in adapter.sites()}
    assert len(tensors) == 2 * len(paths) and fields["general.architecture"] != "llama"
    for path in paths:
        got = change(fields, tensors, f"{names.get_name(path)}.weight")
        np.testing.assert_allclose(got, expected(adapter, path), rtol=0, atol=1e-5)


def test_bloom_heads_are_untangled(tmp_path: Path) -> None:
    adapter = adapted("bloom", LoRA(r=2, targets="query_key_value"))
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    undo = BloomTensorProcessor({"n_head": 4, "hidden_size": 32})
    name = "blk.1.attn_qkv.weight"
    got = undo.process(change(fields, tensors, name), name=name).weights
    np.testing.assert_allclose(
        got, expected(adapter, "transformer.h.1.self_attention.query_key_value"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", ["falcon", "falcon-new", "gpt_neox"])
def test_other_fused_projections_become_queries_then_keys_then_values(family: str, tmp_path: Path) -> None:
    adapter = adapted(family, LoRA(r=2, targets="query_key_value"))
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    path = next(p for p, *_ in adapter.sites())
    heads, kv = {"falcon": (4, 1), "falcon-new": (4, 2), "gpt_neox": (4, 4)}[family]
    rows = expected(adapter, path).reshape(
        kv, heads // kv + 2, 8, 32
    )  # (group, queries of the group + k + v, head size, in)
    want = np.concatenate([rows[:, :-2].reshape(-1, 32), rows[:, -2].reshape(-1, 32), rows[:, -1].reshape(-1, 32)])
    np.testing.assert_allclose(change(fields, tensors, "blk.0.attn_qkv.weight"), want, rtol=0, atol=1e-5)


def test_some_rows_of_a_fused_projection_and_two_deltas_of_one_matrix(tmp_path: Path) -> None:
    adapter = adapted("gpt2", LoRA(r=2, targets=Part("q", "v")))
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    assert tensors["blk.0.attn_qkv.weight.lora_b"].shape == (96, 4)
    got = change(fields, tensors, "blk.0.attn_qkv.weight")
    np.testing.assert_allclose(got, expected(adapter, "transformer.h.0.attn.c_attn"), rtol=0, atol=1e-5)
    assert np.abs(got[32:64]).max() == 0 and np.abs(got[:32]).max() > 0.1


def test_embedding_and_head_of_an_untied_base(tmp_path: Path) -> None:
    adapter = adapted("llama", LoRA(r=2, targets=("embed_tokens", "lm_head")), tie_word_embeddings=False)
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    assert tensors["token_embd.weight.lora_a"].shape == (99, 2) and tensors["token_embd.weight.lora_b"].shape == (32, 2)
    np.testing.assert_allclose(
        change(fields, tensors, "token_embd.weight"), expected(adapter, "model.embed_tokens"), atol=1e-5
    )
    np.testing.assert_allclose(change(fields, tensors, "output.weight"), expected(adapter, "lm_head"), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("llama", IA3(), r"k_proj\.weight: ScaledOutput is no low-rank change.*--to hf"),
        ("bert", BitFit(), "no adapter for model type 'bert'"),
        ("opt", LoRA(), "no adapter for model type 'opt'"),
        ("gpt2", BitFit(targets="c_attn"), r"c_attn\.bias: .* is no low-rank change"),
        ("gpt2", LoRA(targets="lm_head"), "shares its embedding with its output head"),
        ("gemma", LoRA(targets="embed_tokens"), "shares its embedding with its output head"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(family: str, method: object, message: str, tmp_path: Path) -> None:
    adapter = adapted(family, method, **({"tie_word_embeddings": True} if family == "gemma" else {}))
    with pytest.raises(DeltatuneError, match=message):
        write_gguf(adapter, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_union_of_low_rank_deltas_in_some_blocks(tmp_path: Path) -> None:
    method = Union(
        methods=(LoRA(r=2, targets="v_proj"), LoRA(r=5, targets=Layers(targets=("v_proj", "o_proj"), start=1)))
    )
    adapter = adapted("llama", method)
    fields, tensors = back(write_gguf(adapter, tmp_path / "a.gguf"))
    assert len(tensors) == 2 * 3
    assert tensors["blk.1.attn_v.weight.lora_b"].shape == (16, 7)
    for theirs, ours in (
        ("0.attn_v", "0.self_attn.v_proj"),
        ("1.attn_v", "1.self_attn.v_proj"),
        ("1.attn_output", "1.self_attn.o_proj"),
    ):
        got = change(fields, tensors, f"blk.{theirs}.weight")
        np.testing.assert_allclose(got, expected(adapter, f"model.layers.{ours}"), rtol=0, atol=1e-5)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeltatuneError, match="there is no folder .*nowhere"):
        write_gguf(adapted("llama", LoRA()), tmp_path / "nowhere" / "a.gguf")
