"""Models and batches of every shape for the tests of prefixes, prompts and ladders."""

from __future__ import annotations

import torch

from deltatune.methods.prefix import Prefix
from deltatune.models.tiny import PAD, tiny

ROTARY = ("llama", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt_neox", "falcon", "falcon-new")
CAUSAL = (*ROTARY, "mistral", "gpt2", "gptj", "opt", "bloom", "falcon-alibi", "falcon-alibi-eager")
ENCODERS = ("bert", "roberta", "distilbert")
SEQ2SEQ = ("t5", "mt5", "bart")
OTHERS = ("vit", "clip", "whisper")


def build(family, task="lm", **overrides):
    torch.manual_seed(0)
    if family.startswith("falcon-alibi"):
        overrides |= {"alibi": True}
    model = tiny("falcon" if family.startswith("falcon-alibi") else family, task, **overrides)
    if family == "falcon-alibi-eager":
        model.set_attn_implementation("eager")
    return model


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def out(model, given):
    o = model(**given)
    return next(o[k] for k in ("logits", "logits_per_image") if k in o)


def prefixes(adapter):
    return [u for _, u in adapter.units() if isinstance(u, Prefix)]


def padded(side, pads=(0, 2, 4), length=6):
    """Rows of one length, each with its own number of pads on `side`; and the rows without their pads."""
    torch.manual_seed(1)
    rows = [torch.randint(3, 99, (length - n,)) for n in pads]
    ids, mask = torch.full((len(pads), length), PAD), torch.zeros(len(pads), length, dtype=torch.long)
    starts = list(pads) if side == "left" else [0] * len(pads)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}, rows, starts


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None, **options)


GENERATE = (
    "llama", "gemma2", "mistral", "gpt2", "gptj", "opt", "bloom", "falcon", "falcon-new", "falcon-alibi", "t5", "bart",
)  # fmt: skip
