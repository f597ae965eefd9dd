"""Which steps run compiled: decided on given times, and done on a real model."""

from functools import partialmethod

import pytest
import torch
from runs import documents, model_and_adapter
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.core import DeltatuneError
from deltatune.data import Batches
from deltatune.kernels.attention import Blocks
from deltatune.models.blocks import blocked, layout
from deltatune.models.fused import fused
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions
from deltatune.train.pace import MEASURED, SKIPPED, WARM_UP, WORTH, Pace, paced

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TRIAL = SKIPPED + MEASURED


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50))


def compiled(model):
    return [block._compiled_call_impl is not None for block in model.model.layers]


def told(pace, seconds, steps=TRIAL, left=10**9):
    notes = []
    for _ in range(steps):
        before = len(notes)
        pace.step(seconds, 100, left, notes.append)
        if len(notes) == before:
            notes.append(None)
    return notes


@pytest.mark.parametrize(
    ("faster", "said"), [(0.8, "1.25 times the speed: kept"), (1.25, "0.80 times the speed: drop")]
)
def test_a_long_run_tries_and_keeps_the_faster(faster, said):
    model = llama()
    pace = Pace(model, "auto")
    assert told(pace, 1.0, TRIAL - 1) == [None] * (TRIAL - 1) and not any(compiled(model))
    assert told(pace, 1.0, 1) == [None] and all(compiled(model))
    assert told(pace, 50.0, SKIPPED) == [None] * SKIPPED  # what compiling takes is not held against it
    *before, last = told(pace, faster, MEASURED)
    assert before == [None] * (MEASURED - 1) and said in last
    assert all(compiled(model)) if faster < 1 else not any(compiled(model))
    assert told(pace, 0.1) == [None] * TRIAL  # decided once


def test_a_run_too_short_to_pay_for_a_trial_stays_as_it_is():
    for left, tries in ((WORTH * WARM_UP - 1, False), (WORTH * WARM_UP, True)):
        model = llama()
        pace = Pace(model, "auto")
        told(pace, 1.0, left=left)
        assert all(compiled(model)) is tries and any(compiled(model)) is tries


def test_what_was_compiled_is_as_it_was_after_a_run():
    model = llama()
    with paced(model, "compile"):
        assert all(compiled(model))
    assert not any(compiled(model))
    with paced(model, "eager"):
        assert not any(compiled(model))


def test_options_that_cannot_be():
    with pytest.raises(DeltatuneError, match="finds no blocks"):
        Pace(nn.Linear(2, 2), "compile")
    for kept in ("products", "blocks"):
        with pytest.raises(DeltatuneError, match="compiles nothing of blocks that are recomputed"):
            TrainOptions(speed="compile", activation_checkpointing=kept)
    told(Pace(nn.Linear(2, 2), "auto"), 1.0)
    for kept in ("products", "blocks"):
        model = llama()
        with paced(model, "auto", kept) as pace:
            told(pace, 1.0)
            assert not any(compiled(model))


def test_blocks_and_layouts_share_what_was_compiled(monkeypatch):
    """A compiler that made one for each block, or for each batch's documents, would stop at its limit, and run the rest
    as it is."""
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 7}, vocab_size=50, use_cache=False)).train()
    dt.attach(model, dt.LoRA())
    limits = torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)
    with fused(model), blocked(model), paced(model, "compile"), limits:
        for length in range(5, 11):
            documents = Blocks(3, (length, 7))
            ids = torch.arange(documents.total)[None]
            with layout(documents):
                model(input_ids=ids, position_ids=ids).logits.sum().backward()
    assert 0 < counters["stats"]["unique_graphs"] < 3 * 7


@pytest.mark.slow
def test_a_compiled_run_gives_the_same_losses():
    losses = []
    torch._dynamo.reset()
    for speed in ("eager", "compile"):
        model, adapter = model_and_adapter()
        batches = Batches(documents(), packing=True, blocked=True, max_length=32, tokens_per_batch=64)
        told = TrainOptions(max_steps=6, lr=5e-3, tokens_per_step=128, speed=speed)
        losses.append([record["loss"] for record in fit(model, adapter, batches, options=told).history])
    assert counters["stats"]["unique_graphs"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0] * 0.99
