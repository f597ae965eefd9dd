"""LISA: what trains in a period, the draws, the freed state, and exact resume."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.callbacks import lisa as module
from deltatune.callbacks.lisa import LISA
from deltatune.core import Events, Run
from deltatune.models.tiny import inputs, tiny


def begin(options: LISA, family: str = "llama", blocks: int = 4) -> tuple[nn.Module, Run, Events]:
    torch.manual_seed(0)
    model = tiny(family, **({"num_hidden_layers": blocks} if family == "llama" else {})).train()
    run = Run(model, None, 100, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    events = options.start(run)
    events.on_train_start(run)
    return model, run, events


def go(run: Run, events: Events, until: int) -> None:
    batch = inputs(run.model)
    while run.step < until:
        run.step += 1
        batch = inputs(run.model, seed=run.step)
        loss = run.model(**batch, labels=batch["input_ids"]).loss
        events.on_loss(run, loss).backward()
        run.optimizer.step()
        events.on_step_end(run)
        run.optimizer.zero_grad()


def block_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def changed(before: dict[str, Tensor], model: nn.Module) -> set[int | None]:
    return {block_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_in_a_period_the_drawn_blocks_and_what_lies_outside_change() -> None:
    model, run, events = begin(LISA(layers=2, every=3, seed=5))
    for period in range(4):
        drawn, before = events.drawn(period), snapshot(model)  # type: ignore[attr-defined]
        assert len(drawn) == 2
        go(run, events, 3 * (period + 1) - 1)
        assert all((p.grad is None) or block_of(n) in drawn | {None} for n, p in model.named_parameters())
        assert changed(before, model) == drawn | {None}
        outside = {n for n, p in model.named_parameters() if block_of(n) is None and not torch.equal(p, before[n])}
        assert outside == {n for n in before if block_of(n) is None}
        go(run, events, 3 * (period + 1))


def test_a_frozen_block_gives_its_optimizer_state_back() -> None:
    model, run, events = begin(LISA(layers=1, every=2))
    go(run, events, 5)
    names = {p: n for n, p in model.named_parameters()}
    drawn = events.drawn(2)  # type: ignore[attr-defined]
    assert {block_of(names[p]) for p in run.optimizer.state} == drawn | {None}


def test_each_block_is_drawn_equally_often() -> None:
    _, _, events = begin(LISA(layers=1, every=1, seed=3))
    counts = torch.zeros(4)
    for period in range(2000):
        for i in events.drawn(period):  # type: ignore[attr-defined]
            counts[i] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.04


def test_draws_depend_on_the_seed_alone() -> None:
    first, again, other = (begin(LISA(layers=2, seed=s))[2] for s in (1, 1, 2))
    periods = [[e.drawn(p) for p in range(20)] for e in (first, again, other)]  # type: ignore[attr-defined]
    assert periods[0] == periods[1] != periods[2]


def test_all_blocks_is_full_fine_tuning() -> None:
    ends = []
    for lisa in (True, False):
        model, run, events = begin(LISA(layers=4, every=2))
        if not lisa:
            events = Events()
        go(run, events, 5)
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("state_first", [True, False])
@pytest.mark.parametrize("stop", [4, 5])
def test_resumes_bit_for_bit(stop: int, state_first: bool) -> None:
    options = LISA(layers=2, every=2, seed=1)
    whole, run, events = begin(options)
    go(run, events, 9)
    half, run, events = begin(options)
    go(run, events, stop)
    kept = copy.deepcopy((half.state_dict(), run.optimizer.state_dict(), events.state_dict()))
    rest = tiny("llama", num_hidden_layers=4).train()
    rest.load_state_dict(kept[0])
    run = Run(rest, None, 100, optimizer=torch.optim.AdamW(rest.parameters(), lr=1e-2, weight_decay=0.1))
    run.optimizer.load_state_dict(kept[1])
    events = options.start(run)
    for begin_or_load in sorted([0, 1], reverse=state_first):
        events.load_state_dict(kept[2]) if begin_or_load else events.on_train_start(run)
    run.step = stop
    go(run, events, 9)
    assert all(torch.equal(p, snapshot(whole)[n]) for n, p in rest.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_finds_the_blocks_of_each_architecture(family: str) -> None:
    model, run, events = begin(LISA(layers=1, every=1), family)
    blocks = 4 if family == "t5" else 4 if family == "llama" else 2
    assert events.n == blocks  # type: ignore[attr-defined]
    embeddings = model.get_input_embeddings().weight
    assert embeddings.requires_grad
    assert any(not p.requires_grad for p in model.parameters())


def test_the_end_of_training_leaves_every_block_as_it_was() -> None:
    model, run, events = begin(LISA(layers=1, every=1), "llama")
    assert any(not p.requires_grad for p in model.parameters())
    events.on_train_end(run)
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_frozen_before_stay_frozen() -> None:
    model = tiny("llama")
    frozen = model.get_submodule("model.layers.0.self_attn.q_proj").requires_grad_(False)
    run = Run(model, None, 10)
    LISA(layers=2).start(run).on_train_start(run)
    assert not frozen.weight.requires_grad
    assert model.get_submodule("model.layers.0.self_attn.k_proj").weight.requires_grad


def test_wrong_use_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(dt.DeltatuneError, match="layers=3.*has 2 blocks"):
        LISA(layers=3).start(Run(model, None, 1))
    adapter = dt.attach(model, dt.LoRA())
    with pytest.raises(dt.DeltatuneError, match="detach adapter 'default'"):
        LISA().start(Run(model, adapter, 1))


def test_memory_is_that_of_lora_of_a_high_rank_at_any_time() -> None:
    """Bytes of parameters, gradients and optimizer state, counted on Llama-2-7B without storage, in bf16: the base
    trained by two layers at a time against LoRA in fp32, over five periods."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)

    def base() -> nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(config).to(torch.bfloat16)

    def held(tensors: Iterable[Tensor | None]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def peak(model: nn.Module, trained: list[nn.Parameter], callback: LISA | None, steps: int) -> set[int]:
        run = Run(model, None, 100, optimizer=torch.optim.AdamW(trained, foreach=False))
        events = Events() if callback is None else callback.start(run)
        events.on_train_start(run)
        found = set()
        for run.step in range(1, steps + 1):
            for p in trained:
                if p.requires_grad:
                    p.grad = torch.empty_like(p)
            run.optimizer.step()
            moments = (v for s in run.optimizer.state.values() for n, v in s.items() if n != "step")
            everything = {*model.parameters(), *trained}
            found.add(held(everything) + held(p.grad for p in everything) + held(moments))
            events.on_step_end(run)
            run.optimizer.zero_grad(set_to_none=True)
        return found

    def lora(r: int) -> set[int]:
        net = base()
        return peak(net, list(dt.attach(net, dt.LoRA(r=r)).parameters()), None, 1)

    d, inner, n = 4096, 11008, 32
    outside, block, sites = 2 * 32000 * d + d, 4 * d * d + 3 * d * inner + 2 * d, n * (4 * 2 * d + 3 * (d + inner))
    whole, lisa = 2 * (outside + n * block), 2 * 3 * (outside + 2 * block)
    net = base()
    assert peak(net, list(net.parameters()), LISA(layers=2, every=1), 5) == {whole + lisa}
    assert {r: lora(r) for r in (128, 8)} == {r: {whole + 4 * 4 * r * sites} for r in (128, 8)}
    assert (whole + lisa) / (whole + 16 * 128 * sites) == pytest.approx(0.94, abs=0.005)
    assert (whole + lisa) / (whole + 16 * 8 * sites) == pytest.approx(1.27, abs=0.005)
    for held_beside in (lisa, 16 * 128 * sites, 16 * 8 * sites):
        assert f"{(whole + held_beside) / 1e9:.1f} GB" in str(module.__doc__)
    assert f"they meet at r = {lisa / (16 * sites):.0f}" in str(module.__doc__)
