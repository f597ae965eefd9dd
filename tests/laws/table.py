"""The law table: a method obeys every law on every architecture by one line here."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

import deltatune as dt
from deltatune.models.tiny import inputs, tiny

ARCHITECTURES = ("llama", "gpt2", "bloom", "bert", "t5")
METHODS = {
    "lora": dt.LoRA(r=4),
    "rslora": dt.LoRA(r=4, scaling="alpha/sqrt(r)"),
    "lora on q, v": dt.LoRA(r=4, targets=dt.Part("q", "v")),
    "lora, ranks": dt.LoRA(r=4, ranks={".*0.*": 2}, alphas={".*1.*": 3}),
    "lora on embedding": dt.LoRA(r=4, targets=dt.Part("embedding")),
    "dora": dt.DoRA(inner=dt.LoRA(r=4)),
    "dora on q, v": dt.DoRA(inner=dt.LoRA(r=4), targets=dt.Part("q", "v")),
    "ia3": dt.IA3(),
    "bitfit": dt.BitFit(),
    "lora, pissa": dt.LoRA(r=4, init=dt.PiSSA()),
    "rslora, olora": dt.LoRA(r=4, scaling="alpha/sqrt(r)", init=dt.OLoRA()),
    "adalora": dt.AdaLoRA(init_r=4, target_r=2),
    "mixture": dt.Mixture(expert=dt.LoRA(r=4), n=3, top_k=2, targets=dt.Part("o", "down")),
    "mixture of dora": dt.Mixture(expert=dt.DoRA(inner=dt.LoRA(r=2)), n=3, top_k=3, targets=dt.Part("o")),
    "houlsby": dt.Houlsby(size=8),
    "parallel": dt.ParallelAdapter(size=8),
    "prompt": dt.PromptTuning(length=4),
    "prefix": dt.PrefixTuning(length=4),
    "prefix, mlp": dt.PrefixTuning(length=4, hidden=8),
    "mam": dt.MAM(length=4, size=8),
    "oft": dt.OFT(block_size=8),
    "oft, shared, learned magnitude": dt.OFT(block_size=16, blocks="shared", magnitude="learned"),
    "coft": dt.COFT(block_size=8, eps=0.3),
    "oft_v2": dt.OFTv2(block_size=8),
    "boft": dt.BOFT(block_size=4, m=3),
    "boft, learned magnitude": dt.BOFT(magnitude="learned"),
    "vera": dt.VeRA(r=16),
    "said": dt.SAID(d=200),
    "dylora": dt.DyLoRA(r=4),
    "lora dropout": dt.LoRADropout(r=4),
    "lora-drop": dt.LoRADrop(r=4, kept=()),
    "longlora": dt.LongLoRA(r=4),
    "sparse": dt.Sparse(density=0.05),
    "sparse, magnitude": dt.Sparse(density=0.05, coordinates="magnitude"),
    "fish mask": dt.FishMask(density=0.1),
    "child-tuning": dt.ChildTuning(),
    "lt-sft": dt.LTSFT(density=0.1),
    "fish-dip": dt.FishDip(density=0.1),
    "far": dt.FAR(),
    "sam, second order": dt.SAM(density=0.1),
    "diff pruning": dt.DiffPruning(),
    "diff pruning, structured": dt.StructuredDiffPruning(),
    "krona": dt.KronA(),
    "lokr": dt.LoKr(r=2),
    "lokr, both factors": dt.LoKr(r=1, decompose=("w1", "w2")),
    "loha": dt.LoHa(r=2),
    "loha, dense": dt.LoHa(r=6),
    "dora of loha": dt.DoRA(inner=dt.LoHa(r=2)),
    "head": dt.Tune(),
    "lora + head": dt.Union(methods=(dt.LoRA(r=4), dt.Tune())),
}
REFUSED = {("bitfit", "llama"), ("bitfit", "t5")}  # no bias to train
REFUSED |= {("longlora", "bloom"), ("longlora", "t5")}  # no attention function to cut into groups; two sequences
MOVED_AT_START = {"prompt", "prefix", "prefix, mlp", "mam"}  # a prompt is never neutral
CASES = [(m, a) for m in METHODS for a in ARCHITECTURES if (m, a) not in REFUSED]


def quick(method, architecture):
    """Whether the case is among those of every run: Llama, and one more, which goes round from method to method."""
    others = [a for a in ARCHITECTURES if a != "llama" and (method, a) not in REFUSED]
    return architecture == "llama" or architecture == others[crc32(method.encode()) % len(others)]


def cases(among=CASES):
    """A parameter of tests; the cases that are not quick are slow ones."""
    slow = pytest.mark.slow
    return [pytest.param(m, a, id=f"{m}-{a}", marks=() if quick(m, a) else (slow,)) for m, a in among]


def model(architecture, **overrides):
    torch.manual_seed(0)
    return tiny(architecture, **overrides)


def batch(net, rows=2):
    return inputs(net, batch=rows)


def logits(net, given):
    return net(**given).logits


def perturb(adapter, seed=1, size=0.05):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_((torch.randn(p.shape, generator=g) * size).to(p.dtype))
    return adapter


def loss(net, given, seed=3):
    """Cross-entropy against random labels: a gradient for everything that the logits depend on."""
    out = logits(net, given)
    labels = torch.randint(out.shape[-1], out.shape[:-1], generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.cross_entropy(out.float().flatten(0, -2), labels.flatten())


def is_delta(adapter):
    return all(isinstance(u, dt.core.Delta) for _, u in adapter.units())
