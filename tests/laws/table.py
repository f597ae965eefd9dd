"""The law table: a method obeys every law on every architecture by one line here."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import pytest
import torch

import deltatune as dt
from deltatune.core.start import waiting
from deltatune.models.tiny import inputs, tiny


@dataclass(frozen=True, kw_only=True)
class Stages(dt.core.Init):
    """As stages of ReLoRA, PeriodicLoRA and Chain of LoRA leave a LoRA: with a constant beside its factors, which begin
    anew."""

    @torch.no_grad()
    def __call__(self, delta, w):
        for share in (1.0, 0.5, 1.0):
            delta.b.normal_(std=0.05)
            delta.unload(share)
            torch.nn.init.kaiming_uniform_(delta.a, a=5**0.5)
        delta.b.zero_()


ARCHITECTURES = ("llama", "gpt2", "bloom", "bert", "t5")
DRAWN = dt.NearIdentity(std=0.2)  # fused adapters are trained ones, which do not start at the base
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
    "lora, eva": dt.LoRA(r=4, init=dt.EVA()),
    "lora, corda": dt.LoRA(r=4, init=dt.CorDA()),
    "lora, corda preserved": dt.LoRA(r=4, init=dt.CorDAPreserved()),
    "rslora, lora-ga": dt.LoRA(r=4, scaling="alpha/sqrt(r)", init=dt.LoRAGA()),
    "lora, stages": dt.LoRA(r=4, init=Stages()),
    "dora, stages": dt.DoRA(inner=dt.LoRA(r=4, init=Stages())),
    "dora, eva": dt.DoRA(inner=dt.LoRA(r=4, init=dt.EVA())),
    "adalora": dt.AdaLoRA(init_r=4, target_r=2),
    "mixture": dt.Mixture(expert=dt.LoRA(r=4), n=3, top_k=2, targets=dt.Part("o", "down")),
    "mixture of dora": dt.Mixture(expert=dt.DoRA(inner=dt.LoRA(r=2)), n=3, top_k=3, targets=dt.Part("o")),
    "houlsby": dt.Houlsby(size=8),
    "pfeiffer": dt.Pfeiffer(size=8),
    "compacter": dt.Compacter(size=8),
    "compacter++": dt.CompacterPlusPlus(size=8, n=2, k=2),
    "phm adapter": dt.PHMAdapter(size=8, n=2),
    "adapter drop": dt.AdapterDrop(inner=dt.Pfeiffer(size=8)),
    "adapter drop of lora": dt.AdapterDrop(inner=dt.LoRA(r=4)),
    "adapter drop, specialised": dt.AdapterDrop(inner=dt.Houlsby(size=8), n=1),
    "sparse adapter": dt.SparseAdapter(inner=dt.Houlsby(size=8)),
    "sparse adapter of lora": dt.SparseAdapter(inner=dt.LoRA(r=4), score="random", std=None),
    "parallel": dt.ParallelAdapter(size=8),
    "adapter fusion": dt.AdapterFusion(adapters=("a", "b"), methods=2 * (dt.Houlsby(norms=None, init=DRAWN),)),
    "adapter fusion, pfeiffer": dt.AdapterFusion(adapters=("a", "b", "c"), methods=3 * (dt.Pfeiffer(init=DRAWN),)),
    "adamix": dt.AdaMix(expert=dt.Houlsby(size=8, norms=None)),
    "adamix of lora": dt.AdaMix(expert=dt.LoRA(r=4), n=2, sharing="none"),
    "prompt": dt.PromptTuning(length=4),
    "multitask prompt": dt.MultitaskPrompt(length=4, r=2),
    "intrinsic prompt": dt.IntrinsicPrompt(length=4, dim=8, hidden=16),
    "intrinsic subspace": dt.IntrinsicSubspace(length=4, dim=8, hidden=16),
    "prefix": dt.PrefixTuning(length=4),
    "prefix, mlp": dt.PrefixTuning(length=4, hidden=8),
    "prefix, text": dt.PrefixTuning(length=4, init=(11, 42, 7)),
    "p-tuning": dt.PTuning(length=4),
    "p-tuning, mlp": dt.PTuning(length=4, encoder="mlp"),
    "p-tuning v2": dt.PTuningV2(length=4),
    "mam": dt.MAM(length=4, size=8),
    "unipelt": dt.UniPELT(length=4, hidden=8, r=2, size=4),
    "s4": dt.S4(budget=1500),
    "s4, outer groups, no bitfit": dt.S4(
        budget=1500,
        groups=(1, 0, 0, 1),
        strategies=(("adapter", "lora"), ("adapter",), ("prefix",), ("prefix", "lora")),
    ),
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
    "ladder": dt.LadderSideTuning(reduction=2),
    "ladder, residual": dt.ResidualLadder(reduction=2, kept=(1,)),
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
QUANTISED = {  # what starts from what a quantised base has lost
    "lora, loftq": dt.LoRA(r=4, init=dt.LoftQ()),
    "lora, loftq, 3 iterations": dt.LoRA(r=4, init=dt.LoftQ(iterations=3)),
    "lora, qpissa": dt.LoRA(r=4, init=dt.QPiSSA()),
    "lora, qpissa, 2 iterations": dt.LoRA(r=4, init=dt.QPiSSA(iterations=2)),
}
REFUSED = {("bitfit", "llama"), ("bitfit", "t5")}  # no bias to train
REFUSED |= {("longlora", "bloom"), ("longlora", "t5")}  # no attention function to cut into groups; two sequences
REFUSED |= {("s4", "llama"), ("s4", "t5")}  # as bitfit
REFUSED |= {("unipelt", "bloom")}  # no attention function where a prefix could be weighed for each query
MOVED_AT_START = {"prompt", "prefix", "prefix, mlp", "mam"}  # a prompt is never neutral
MOVED_AT_START |= {"unipelt", "s4", "s4, outer groups, no bitfit"}
MOVED_AT_START |= {"ladder"}  # the head reads the ladder alone, whose Up is drawn
MOVED_AT_START |= {"prefix, text", "p-tuning", "p-tuning, mlp", "p-tuning v2"}
MOVED_AT_START |= {"multitask prompt", "intrinsic prompt", "intrinsic subspace"}
MOVED_AT_START |= {"lora, stages", "dora, stages"}  # which is what they have learned
MOVED_AT_START |= {"adapter fusion", "adapter fusion, pfeiffer"}
MOVED_AT_START |= {"phm adapter", "sparse adapter"}  # their authors draw every projection
CASES = [(m, a) for m in METHODS for a in ARCHITECTURES if (m, a) not in REFUSED]


def quick(method, architecture):
    """Whether the case is among those of every run: one architecture, which goes round from method to method."""
    able = [a for a in ARCHITECTURES if (method, a) not in REFUSED]
    return architecture == able[crc32(method.encode()) % len(able)]


def cases(among=CASES):
    """A parameter of tests; the cases that are not quick are slow ones."""
    slow = pytest.mark.slow
    return [pytest.param(m, a, id=f"{m}-{a}", marks=() if quick(m, a) else (slow,)) for m, a in among]


def model(architecture, **overrides):
    torch.manual_seed(0)
    return tiny(architecture, **overrides)


def batch(net, rows=2):
    return inputs(net, batch=rows)


def attach(net, method, name="default", **options):
    """As `dt.attach`; what starts from data starts from the same few rows."""
    adapter = dt.attach(net, method, name, **options)
    if waiting(adapter):
        rows = [inputs(net, batch=8, seed=seed) for seed in (1, 2)]
        dt.initialise(adapter, lambda n: (loss(net, given) for given in rows[:n]))
    return adapter


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
