"""DyLoRA: every prefix of the ranks is a LoRA, what learns in a step, the draws, truncation, and PEFT."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.callbacks.dylora import Rank, RankDraw
from deltatune.core import Events, Run
from deltatune.data import Batches, Example
from deltatune.models.tiny import inputs, tiny
from deltatune.train import TrainOptions, fit


def linear(**options: object) -> tuple[nn.Sequential, dt.Adapter, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 6)).double().train()
    adapter = dt.attach(net, dt.DyLoRA(**{"r": 5, "alpha": 3.0, "targets": "0"} | options))
    shake(adapter)
    return net, adapter, next(u for _, u in adapter.units())


def shake(adapter: dt.Adapter, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)


def begin(net: nn.Module, adapter: dt.Adapter, steps: int = 50, step: int = 0) -> tuple[Run, Events]:
    run = Run(net, adapter, steps, step=step)
    (events,) = (c.start(run) for c in adapter.callbacks())
    events.on_train_start(run)
    return run, events


@pytest.mark.parametrize("b", [1, 3, 5])
@pytest.mark.parametrize("update", ["frozen", "full"])
def test_a_step_at_rank_b_is_lora_of_rank_b_with_its_scale(b: int, update: str) -> None:
    net, _, unit = linear(update=update)
    unit.rank.b = b
    x = torch.randn(4, 7, dtype=torch.double)
    want = x @ net[0].weight.T + net[0].bias
    for i in range(b):  # one rank after the other
        want = want + (3.0 / b) * (x @ unit.a[i])[:, None] * unit.b[:, i]
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("b", [1, 3, 5])
@pytest.mark.parametrize("update", ["frozen", "full"])
def test_what_learns_in_a_step(b: int, update: str) -> None:
    """Frozen: rank b alone. Full: the first b. Nothing beyond b, and what learns has LoRA's gradient."""
    net, _, unit = linear(update=update)
    unit.rank.b = b
    x = torch.randn(4, 7, dtype=torch.double)
    net(x).square().sum().backward()
    learns = torch.zeros(5, dtype=torch.bool)
    learns[b - 1 if update == "frozen" else 0 : b] = True
    assert torch.equal(unit.a.grad.any(1), learns) and torch.equal(unit.b.grad.any(0), learns)
    a, up = unit.a[:b].detach().requires_grad_(), unit.b[:, :b].detach().requires_grad_()
    (x @ net[0].weight.T + net[0].bias + (3.0 / b) * x @ a.T @ up.T).square().sum().backward()
    torch.testing.assert_close(unit.a.grad[learns], a.grad[learns[:b]], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(unit.b.grad[:, learns], up.grad[:, learns[:b]], rtol=1e-11, atol=1e-11)


def test_one_draw_a_step_for_all_sites_and_all_ranks_outside_training() -> None:
    model = tiny("llama").train()
    adapter = dt.attach(model, dt.DyLoRA(r=6, r_min=2, seed=3))
    shake(adapter)
    batch = inputs(model)
    whole = model.eval()(**batch).logits
    run, events = begin(model.train(), adapter)
    units = [u for _, u in adapter.units()]
    drawn = []
    for run.step in range(1, 201):
        assert len({u.product()[1].shape[0] for u in units}) == 1
        drawn.append(units[0].product()[1].shape[0])
        events.on_loss(run, torch.zeros(()))  # micro-batches do not draw
        assert units[-1].product()[1].shape[0] == drawn[-1]
        events.on_step_end(run)
    count = Counter(drawn)
    assert set(count) == {2, 3, 4, 5, 6} and min(count.values()) > 20
    torch.testing.assert_close(model.eval()(**batch).logits, whole)
    events.on_train_end(run)
    torch.testing.assert_close(model.train()(**batch).logits, whole)


def test_a_draw_depends_on_the_seed_and_the_step_alone() -> None:
    def draws(seed: int, first: int) -> list[int]:
        net, adapter, unit = linear(seed=seed)
        run, events = begin(net, adapter, step=first)
        found = []
        for run.step in range(first + 1, 41):
            found.append(unit.rank.b)
            events.on_step_end(run)
        return found

    assert draws(0, 0)[25:] == draws(0, 25)  # resumed
    assert draws(0, 0) != draws(1, 0)
    torch.manual_seed(9)
    assert draws(0, 0) == [RankDraw(r=5).draw(step) for step in range(1, 41)]


def test_full_updates_at_full_rank_are_lora_step_by_step() -> None:
    nets = []
    for method in (dt.DyLoRA(r=4, r_min=4, alpha=6, update="full", targets="0"), dt.LoRA(r=4, alpha=6, targets="0")):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 6)).double().train()
        adapter = dt.attach(net, method)
        run = Run(net, adapter, 5)
        events = [c.start(run) for c in adapter.callbacks()]
        [e.on_train_start(run) for e in events]
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
        for run.step in range(1, 6):
            x = torch.randn(4, 7, dtype=torch.double, generator=torch.Generator().manual_seed(run.step))
            optimizer.zero_grad()
            (net(x) - 1).square().sum().backward()
            optimizer.step()
            [e.on_step_end(run) for e in events]
        nets.append(list(adapter.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*nets, strict=True))


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_a_truncated_adapter_is_the_step_at_its_rank(family: str, b: int) -> None:
    model = tiny(family)
    adapter = dt.attach(model, dt.DyLoRA(r=4, alpha=5.0), "whole")
    shake(adapter)
    batch = inputs(model)
    whole = model(**batch).logits
    units = [m for _, u in adapter.units() for m in u.modules() if isinstance(m, Rank)]
    units[0].b = b
    want = model.train()(**batch).logits
    units[0].b = None
    model.eval()
    small = dt.DyLoRA.truncate(adapter, b, "small")
    assert small.name == "small" and isinstance(small.method, dt.LoRA)
    assert small.method == dt.LoRA(r=b, alpha=5.0)
    torch.testing.assert_close(model(**batch).logits, want, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) * 4 == sum(p.numel() for p in adapter.parameters()) * b
    dt.activate(model, "whole")
    assert torch.equal(model(**batch).logits, whole)


def test_what_is_trained_beside_it_comes_along_and_what_cannot_be_cut_is_refused() -> None:
    model = tiny("llama")
    adapter = dt.attach(model, dt.Union(methods=(dt.DyLoRA(r=3), dt.Tune())), "both")
    shake(adapter)
    batch = inputs(model)
    want = model(**batch).logits
    dt.DyLoRA.truncate(adapter, 3, "all")
    torch.testing.assert_close(model(**batch).logits, want)
    with pytest.raises(dt.DeltatuneError, match="ranks 1 to 3; it cannot be cut to 4"):
        dt.DyLoRA.truncate(adapter, 4, "more")
    with pytest.raises(dt.DeltatuneError, match="'lora' is a LoRA, without nested ranks"):
        dt.DyLoRA.truncate(dt.attach(model, dt.LoRA(), "lora"), 2, "less")
    assert set(dt.adapters(model)) == {"both", "all", "lora"}


def test_peft_reads_a_truncated_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    base = copy.deepcopy(model)
    batch = inputs(model)
    adapter = dt.attach(model, dt.DyLoRA(r=6, alpha=9.0))
    shake(adapter)
    dt.DyLoRA.truncate(adapter, 2, "small").save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    got = theirs(**batch).logits
    for layer in (m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)):
        assert layer.r["default"] == 2 and layer.scaling["default"] == 4.5
    torch.testing.assert_close(got, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_run_resumes_bit_for_bit_and_small_ranks_have_learned(tmp_path: Path) -> None:
    def train(folder: Path, save: int, resume: bool = False, seed: int = 0) -> tuple[nn.Module, dt.Adapter]:
        torch.manual_seed(0)
        model = tiny("llama")
        torch.manual_seed(seed)
        adapter = dt.attach(model, dt.DyLoRA(r=4, targets=dt.Part("q", "v", "up")))
        rows = [Example([3, 4 + i % 5, 9, 10, 11], [-100, -100, 9, 10, 11], f"row {i}") for i in range(16)]
        options = TrainOptions(max_steps=24, lr=1e-2, batch_size=8, save_every=save)
        fit(model, adapter, Batches(rows, batch_size=8), options=options, output=folder, resume=resume)
        return model, adapter

    model, adapter = train(tmp_path / "whole", 24)
    train(tmp_path / "halves", 10)
    (tmp_path / "halves" / "checkpoints" / "last").write_text("step-20")
    _, resumed = train(tmp_path / "halves", 10, resume=True, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), resumed.parameters(), strict=True))

    def loss() -> Tensor:
        ids = torch.tensor([[3, 5, 9, 10, 11]])
        return nn.functional.cross_entropy(model(input_ids=ids).logits[0, 1:4], ids[0, 2:])

    dt.activate(model)
    losses = [loss()]
    for b in (1, 2, 4):
        dt.DyLoRA.truncate(adapter, b, f"r{b}")
        losses.append(loss())
    assert all(small < losses[0] - 0.5 for small in losses[1:])


def test_options_are_checked() -> None:
    with pytest.raises(dt.DeltatuneError, match="r_min must lie between 1 and r=4, got 5"):
        dt.DyLoRA(r=4, r_min=5)
    with pytest.raises(dt.DeltatuneError, match="update is 'frozen' or 'full', got 'half'"):
        dt.DyLoRA(update="half")  # type: ignore[arg-type]
    net = nn.Linear(3, 3)
    with pytest.raises(dt.DeltatuneError, match="use it with DyLoRA"):
        RankDraw(r=2).start(Run(net, dt.attach(net, dt.LoRA(targets=nn.Linear)), 5))
