"""Adapters as the package `adapters` (AdapterHub) saves them, beside their bases and the logits that it computes.

    python tests/parity/adapters_library.py FOLDER        in an environment with `adapters`: see `make parity-adapters`

FOLDER/<architecture>/base.safetensors, outputs.safetensors (what went in, and logits by kind), and a folder a kind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB, D, LAYERS, HEADS = 24, 8, 2, 2  # small, for what is written lies in the repository
_DEEP = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * D}
_TEXT = _DEEP | {"max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder")
          for key, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", 2 * D))}  # fmt: skip
BASES: dict[str, tuple[str, dict[str, Any]]] = {  # model type: class, configuration
    "bert": ("BertForMaskedLM", _TEXT | {"type_vocab_size": 2}),
    "roberta": ("RobertaForMaskedLM", _TEXT | {"type_vocab_size": 1}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 16,
             "n_inner": 2 * D}),
    "llama": ("LlamaForCausalLM", _TEXT | {"num_key_value_heads": 1}),
    "t5": ("T5ForConditionalGeneration", {"d_model": D, "d_kv": 4, "d_ff": 2 * D, "num_layers": LAYERS,
           "num_decoder_layers": 1, "num_heads": HEADS, "decoder_start_token_id": 0,
           "relative_attention_num_buckets": 8}),
    "bart": ("BartForConditionalGeneration", _SIDES | {"d_model": D, "max_position_embeddings": 16, "pad_token_id": 0,
             "decoder_layers": 1, "decoder_start_token_id": 2}),
}  # fmt: skip
EVERYWHERE = ("houlsby", "pfeiffer", "parallel", "compacter", "prefix")
KINDS = {  # architecture: what is saved there
    "bert": (*EVERYWHERE, "houlsby-scaled", "pfeiffer-both", "left-out", "parallel-learned", "compacter++", "phm",
             "prefix-flat", "mam", "unipelt", "lora", "ia3", "fusion"),
    "roberta": ("houlsby", "pfeiffer", "unipelt"),
    "gpt2": (*EVERYWHERE, "compacter++", "prefix-flat", "lora", "fusion"),
    "llama": (*EVERYWHERE, "prefix-flat", "mam", "lora", "ia3"),
    "t5": ("houlsby", "pfeiffer", "parallel", "compacter", "lora"),
    "bart": (*EVERYWHERE, "pfeiffer-both", "mam", "lora"),
}  # fmt: skip
FUSED = ("one", "two")


def base(kind: str) -> Any:
    """The base, its weights drawn by the order of their names."""
    import transformers

    name, options = BASES[kind]
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, **options)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    # under "sdpa" the package's causal attention sees too little beside a prefix, where nothing is padded
    return getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator)
    both = kind in ("t5", "bart")
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, 2:].flip(0)} if both else {})


def _kinds() -> dict[str, Callable[[], Any]]:
    import adapters as a

    half = {"reduction_factor": 2}
    return {
        "houlsby": lambda: a.DoubleSeqBnConfig(**half),
        "houlsby-scaled": lambda: a.DoubleSeqBnConfig(**half, scaling=3.0, non_linearity="relu"),
        "pfeiffer": lambda: a.SeqBnConfig(**half),
        "pfeiffer-both": lambda: a.SeqBnConfig(**half, mh_adapter=True),
        "left-out": lambda: a.SeqBnConfig(reduction_factor={"1": 4, "default": 2}, leave_out=[0]),
        "parallel": lambda: a.ParBnConfig(**half, scaling=3.0),
        "parallel-learned": lambda: a.ParBnConfig(**half, scaling="learned"),
        "compacter": lambda: a.CompacterConfig(**half, phm_rank=2),
        "compacter++": lambda: a.CompacterPlusPlusConfig(**half),
        "phm": lambda: a.CompacterConfig(**half, factorized_phm_W=False, shared_phm_rule=False),
        "prefix": lambda: a.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
        "prefix-flat": lambda: a.PrefixTuningConfig(prefix_length=3, flat=True),
        "mam": lambda: a.ConfigUnion(
            a.PrefixTuningConfig(prefix_length=3, bottleneck_size=5), a.ParBnConfig(**half, scaling=3.0)
        ),
        "unipelt": lambda: a.ConfigUnion(
            a.LoRAConfig(r=2, alpha=3, use_gating=True),
            a.PrefixTuningConfig(prefix_length=3, bottleneck_size=5, use_gating=True),
            a.SeqBnConfig(**half, use_gating=True),
        ),
        "lora": lambda: a.LoRAConfig(r=2, alpha=3, attn_matrices=["q", "v"], intermediate_lora=True),
        "ia3": lambda: a.IA3Config(),
    }


@torch.no_grad()
def _draw(model: Any, known: set[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if name not in known:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def _save(model: Any, folder: Path, name: str) -> None:
    """With `use_safetensors=True`, but for prefixes, which the package then fails to write: they are one tensor under a
    name in each layer. What it leaves out of T5's files, whose names have no prefix, is added."""
    from safetensors.torch import load_file, save_file

    shared = {k: t for k, t in model.named_parameters() if k.startswith(f"shared_parameters.{name}.")}
    try:
        model.save_adapter(str(folder), name, with_head=False, use_safetensors=True)
    except RuntimeError:
        model.save_adapter(str(folder), name, with_head=False)
        pickle = folder / "pytorch_adapter.bin"
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for key, t in sorted(torch.load(pickle, weights_only=True).items(), key=lambda item: -len(item[0])):
            found[t.data_ptr()] = key, t
        save_file(dict(found.values()), folder / "adapter.safetensors")
        pickle.unlink()
    if shared:
        save_file(load_file(folder / "adapter.safetensors") | shared, folder / "adapter.safetensors")


@torch.no_grad()
def _write(kind: str, out: Path) -> None:
    import adapters
    from adapters.composition import Fuse
    from safetensors.torch import save_file

    model, given = base(kind), inputs(kind)
    known = {name for name, _ in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for _, p in sorted(model.named_parameters()):
        p.copy_((p if p.ndim == 1 else 0.0) + 0.25 * torch.randn(p.shape, generator=generator))
    out.mkdir(parents=True)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "base.safetensors")
    found = {"base": model(**given).logits}
    adapters.init(model)
    made = _kinds()
    for seed, what in enumerate(KINDS[kind]):
        names = FUSED if what == "fusion" else (what.replace("+", "p"),)
        for i, name in enumerate(names):
            model.add_adapter(name, config=made["pfeiffer" if what == "fusion" else what]())
            _draw(model, known, 100 * seed + i)
            known |= {n for n, _ in model.named_parameters()}
            _save(model, out / name, name)
        if what == "fusion":
            model.add_adapter_fusion(Fuse(*names))
            _draw(model, known, 100 * seed + 50)
            model.save_adapter_fusion(str(out / "fusion"), Fuse(*names), use_safetensors=True)
            model.set_active_adapters(Fuse(*names))
        else:
            model.set_active_adapters(names[0])
        model.eval()
        found[what] = model(**given).logits
        model.set_active_adapters(None)
        if what == "fusion":
            model.delete_adapter_fusion(Fuse(*names))
        for name in names:
            model.delete_adapter(name)
        known = {n for n, _ in model.named_parameters()}
    save_file({k: t.contiguous() for k, t in (given | found).items()}, out / "outputs.safetensors")


if __name__ == "__main__":
    for kind in BASES:
        _write(kind, Path(sys.argv[1]) / kind)
