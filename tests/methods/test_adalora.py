"""AdaLoRA: the budget, the importance of triplets, the penalty, exact resume, and PEFT step by step."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs_of import run_on_llama
from torch import Tensor, nn

import deltatune as dt
from deltatune.callbacks.adalora import RankAllocation
from deltatune.core import Events, Run
from deltatune.methods.adalora import Triplets
from deltatune.models.tiny import inputs, tiny

TARGETS = ("q_proj", "down_proj")


def begin(method: dt.AdaLoRA, steps: int, seed: int = 0) -> tuple[nn.Module, dt.Adapter, Run, Events]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    adapter = dt.attach(model, method)
    run = Run(model, adapter, steps, optimizer=torch.optim.Adam(adapter.parameters(), lr=1e-2))
    (events,) = (c.start(run) for c in adapter.callbacks())
    events.on_train_start(run)
    return model, adapter, run, events


def go(run: Run, events: Events, until: int, micro: int = 1) -> list[int]:
    """Train to step `until`; the number of non-zero triplets after each step."""
    left = []
    while run.step < until:
        run.step += 1
        generator = torch.Generator().manual_seed(run.step)
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
        for a, b in zip(x.chunk(micro), y.chunk(micro), strict=True):
            events.on_loss(run, (run.model(a) - b).square().mean() / micro).backward()
        events.on_grads(run)
        run.optimizer.step()
        events.on_step_end(run)
        run.optimizer.zero_grad()
        left.append(sum(int((u.e != 0).sum()) for _, u in run.adapter.units()))
    return left


def method(**options: object) -> dt.AdaLoRA:
    return dt.AdaLoRA(**{"target_r": 2, "init_r": 5, "t_init": 3, "t_final": 4, "targets": nn.Linear} | options)


def test_only_e_has_a_gradient_at_the_start() -> None:
    model, adapter, _, _ = begin(method(), 20)
    x = torch.randn(4, 6)
    want = nn.Sequential(*(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)))
    want.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    assert torch.equal(model(x), want(x))
    model(x).sum().backward()
    for _, u in adapter.units():
        assert u.e.grad.abs().sum() > 0 and not u.a.grad.any() and not u.b.grad.any()
        assert 0.01 < u.a.std() < 0.03 and 0.01 < u.b.std() < 0.03


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_budget_schedule(data: st.DataObject) -> None:
    steps = data.draw(st.integers(3, 60))
    t_init = data.draw(st.integers(0, steps - 2))
    t_final = data.draw(st.integers(0, steps - t_init - 2))
    init_r, n = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 8))
    target_r = data.draw(st.integers(1, init_r))
    (rule,) = dt.AdaLoRA(target_r=target_r, init_r=init_r, t_init=t_init, t_final=t_final).callbacks()
    first, last = init_r * n, target_r * n
    budgets = [rule.budget(t, steps, first) for t in range(steps + 1)]
    assert budgets[: t_init + 1] == [first] * (t_init + 1)
    assert budgets[steps - t_final :] == [last] * (t_final + 1)
    assert budgets == sorted(budgets, reverse=True)
    for t in range(t_init + 1, steps - t_final):
        left = 1 - (t - t_init) / (steps - t_final - t_init)
        assert budgets[t] == int((first - last) * left**3 + last)


def test_exactly_the_budget_is_left_after_each_choice() -> None:
    steps = 20
    _, adapter, run, events = begin(method(), steps)
    (rule,) = adapter.callbacks()
    left = go(run, events, steps)
    assert left == [rule.budget(t, steps, 10) for t in range(1, steps + 1)]
    assert left[2] == 10 and left[-1] == 4


def test_choices_are_made_every_few_steps_and_the_last_is_final() -> None:
    steps = 20
    _, adapter, run, events = begin(method(every=5), steps)
    chosen = []
    for t in range(1, steps + 1):
        go(run, events, t)
        chosen.append(torch.cat([u.e[:, 0] != 0 for _, u in adapter.units()]))
    (rule,) = adapter.callbacks()
    assert [int(c.sum()) for c in chosen[3:5]] == [10, rule.budget(5, steps, 10)]
    assert int(chosen[15].sum()) == 4  # forced at T - t_final = 16
    assert all(torch.equal(c, chosen[15]) for c in chosen[16:])


def test_importance_against_a_loop() -> None:
    """eq. 7-10 entry by entry, with the mean already updated in the spread."""
    _, adapter, run, events = begin(method(t_init=8, beta1=0.7, beta2=0.6), 20)
    averages: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    step_end = events.on_step_end

    def watched(run: Run) -> None:
        for i, (_, u) in enumerate(adapter.units()):
            for n in "abe":
                mean, spread = averages.get((i, n), (torch.zeros(()), torch.zeros(())))
                now = (getattr(u, n) * getattr(u, n).grad).abs().detach().double()
                mean = 0.7 * mean + 0.3 * now
                averages[i, n] = mean, 0.6 * spread + 0.4 * (now - mean).abs()
        step_end(run)

    events.on_step_end = watched  # type: ignore[method-assign]
    go(run, events, 6)
    want = []
    for i in range(2):
        s = {n: averages[i, n][0] * averages[i, n][1] for n in "abe"}
        for j in range(5):
            want.append(s["e"][j, 0] + s["b"][:, j].sum() / len(s["b"]) + s["a"][j].sum() / s["a"].shape[1])
    got = events.scores().double()  # type: ignore[attr-defined]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-14)


def test_penalty_is_the_mean_distance_from_orthonormal() -> None:
    _, adapter, run, events = begin(method(orthogonality=0.3), 20)
    want = 0.0
    for _, u in adapter.units():
        for m in (u.a @ u.a.T, u.b.T @ u.b):
            want += (m.detach() - torch.eye(5)).square().sum().sqrt().item() / 4
    assert events.on_loss(run, torch.zeros(())).item() == pytest.approx(0.3 * want, rel=1e-5)
    assert events.on_loss(run, torch.zeros(())).item() == 0  # once a step
    with torch.no_grad():
        for _, u in adapter.units():
            u.a.copy_(torch.linalg.qr(torch.randn(u.a.shape[1], 5))[0].T)
            u.b.copy_(torch.linalg.qr(torch.randn(len(u.b), 5))[0])
    events.on_step_end(run)
    assert events.on_loss(run, torch.zeros(())).item() == pytest.approx(0, abs=1e-5)


def test_micro_batches_change_nothing() -> None:
    ends = []
    for micro in (1, 4):
        _, adapter, run, events = begin(method(), 20)
        go(run, events, 12, micro)
        ends.append([p.detach().clone() for p in adapter.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stop", [7, 17])
def test_resumes_bit_for_bit(stop: int) -> None:
    steps = 20
    _, adapter, run, events = begin(method(), steps)
    go(run, events, steps)
    _, half, run, events = begin(method(), steps)
    go(run, events, stop)
    kept = copy.deepcopy((half.state_dict(), run.optimizer.state_dict(), events.state_dict()))
    _, rest, run, events = begin(method(), steps, seed=9)
    run.model.load_state_dict({k: v for k, v in adapter.model.state_dict().items()})
    rest.load_state_dict(kept[0])
    run.optimizer.load_state_dict(kept[1])
    events.load_state_dict(kept[2])
    run.step = stop
    go(run, events, steps)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), rest.parameters(), strict=True))


@pytest.mark.parametrize("t_final", [0, 4])
def test_weights_are_kept_from_the_final_choice_on(t_final: int) -> None:
    """The step that is kept first is the one whose choice is for good, not the one before."""
    steps, (rule,) = 20, method(t_final=t_final).callbacks()
    _, adapter, run, events = begin(method(t_final=t_final), steps)
    assert run.keep_from == steps - t_final
    go(run, events, run.keep_from)
    final = [u.e != 0 for _, u in adapter.units()]
    assert sum(int(f.sum()) for f in final) == rule.budget(steps, steps, 10) < rule.budget(5, steps, 10)
    go(run, events, steps)
    assert all(torch.equal(u.e != 0, f) for (_, u), f in zip(adapter.units(), final, strict=True))


def test_a_later_step_to_keep_from_stands() -> None:
    _, adapter, run, _ = begin(method(), 20)
    (rule,) = adapter.callbacks()
    run.keep_from = 18
    rule.start(run)
    assert run.keep_from == 18


@pytest.mark.parametrize(("stop", "early_stop"), [(4, 2), (10, None)])
def test_a_whole_run_keeps_the_final_budget(stop: int, early_stop: int | None, tmp_path: Path) -> None:
    """Through `fit`, interrupted before and after the final choice; the loss on the held-out rows is least early on."""
    pruned = dt.AdaLoRA(target_r=1, init_r=4, t_init=2, t_final=3)
    adapter, result = run_on_llama(pruned, tmp_path, stop=stop, steps=12, lr=5e-2, early_stop=early_stop)
    left = [int((u.e != 0).sum()) for _, u in adapter.units()]
    assert sum(left) == len(left)
    assert result.best is not None and result.best["step"] == result.kept >= 9


def test_dropping_zero_triplets_changes_nothing() -> None:
    model, adapter, run, events = begin(method(), 20)
    go(run, events, 20)
    x = torch.randn(3, 6)
    want = model(x)
    for _, u in adapter.units():
        keep = u.e[:, 0] != 0
        for n, part in (("a", u.a[keep]), ("b", u.b[:, keep]), ("e", u.e[keep])):
            setattr(u, n, nn.Parameter(part.detach()))
    torch.testing.assert_close(model(x), want)


def test_peft_step_by_step() -> None:
    """The same tensors, loss, penalty and choices for a whole run."""
    torch.manual_seed(0)
    steps = 14
    ours = tiny("llama")
    batch = inputs(ours)
    config = peft.AdaLoraConfig(
        target_r=2, init_r=4, tinit=3, tfinal=4, deltaT=2, beta1=0.8, beta2=0.7, lora_alpha=10, orth_reg_weight=0.4,
        total_step=steps, target_modules=list(TARGETS), task_type="CAUSAL_LM")  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    same = dt.AdaLoRA(
        target_r=2, init_r=4, t_init=3, t_final=4, every=2, beta1=0.8, beta2=0.7, alpha=10, orthogonality=0.4,
        targets=TARGETS)  # fmt: skip
    adapter = dt.attach(ours, same)
    pairs = [(u, theirs.get_submodule(f"base_model.model.{path}")) for path, _, u, _ in adapter.sites()]
    with torch.no_grad():
        for unit, layer in pairs:
            for mine, name in ((unit.a, "lora_A"), (unit.b, "lora_B"), (unit.e, "lora_E")):
                getattr(layer, name)["default"].copy_(mine)
    run = Run(ours, adapter, steps, optimizer=torch.optim.SGD(adapter.parameters(), lr=0.5))
    (events,) = (c.start(run) for c in adapter.callbacks())
    reference = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for run.step in range(1, steps + 1):
        mine = events.on_loss(run, ours(**batch, labels=batch["input_ids"]).loss)
        loss = theirs(**batch, labels=batch["input_ids"]).loss
        torch.testing.assert_close(mine, loss, rtol=1e-4, atol=1e-5)
        for value, optimizer in ((mine, run.optimizer), (loss, reference)):
            value.backward()
            optimizer.step()
        events.on_step_end(run)
        theirs.base_model.update_and_allocate(run.step)
        run.optimizer.zero_grad()
        reference.zero_grad()
        for unit, layer in pairs:
            e = layer.lora_E["default"]
            assert torch.equal(unit.e != 0, e != 0), run.step
            torch.testing.assert_close(unit.e, e, rtol=1e-3, atol=1e-6)
    assert sum(int((u.e != 0).sum()) for u, _ in pairs) == 2 * len(pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_merges_and_comes_back_from_a_file(family: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    batch = inputs(model)
    adapter = dt.attach(model, dt.AdaLoRA(target_r=2, init_r=4))
    with torch.no_grad():
        for role, p in adapter.roles():
            if role == "scale":
                p.normal_()
    want = model(**batch).logits
    dt.merge(model)
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-4, rtol=1e-4)
    dt.unmerge(model)
    adapter.save(tmp_path)
    dt.detach(model)
    dt.load(model, tmp_path)
    assert torch.equal(model(**batch).logits, want)


def test_inside_another_delta() -> None:
    """DoRA of AdaLoRA: the triplets are found where they are nested."""
    model = nn.Linear(6, 5)
    inner = method(targets=None)
    adapter = dt.attach(model, dt.DoRA(inner=inner, targets=nn.Linear))
    (rule,) = inner.callbacks()
    events = rule.start(Run(model, adapter, 20))
    assert set(events.state_dict()) == {f"{w}.0.inner.{n}" for w in ("mean", "spread") for n in "abe"}
    assert isinstance(next(u for _, u in adapter.units()).inner, Triplets)


def test_options_are_checked() -> None:
    with pytest.raises(dt.DeltatuneError, match="target_r must lie between 1 and init_r=4, got 6"):
        dt.AdaLoRA(target_r=6, init_r=4)
    with pytest.raises(dt.DeltatuneError, match="every=0"):
        dt.AdaLoRA(every=0)
    with pytest.raises(dt.DeltatuneError, match="leave no step of 7"):
        begin(method(), 7)
    _, _, _, events = begin(method(), 20)
    with pytest.raises(dt.DeltatuneError, match="another adapter's: 'mean"):
        events.load_state_dict({})
    assert isinstance(next(iter(method().callbacks())), RankAllocation)
