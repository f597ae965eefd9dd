from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from runs import model_and_adapter, packed_batches
from torch import nn

from deltatune.core import Callback, Events, Init, Run, activate, attach
from deltatune.core.errors import DeltatuneError
from deltatune.data import Batches, Example
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny
from deltatune.train.loop import Result, fit
from deltatune.train.options import TrainOptions
from deltatune.train.proof import checksums

PART = r"model.layers.1.mlp.down_proj"


def _fit(model: Any, adapter: Any, callbacks: Any = (), steps: int = 1, **options: Any) -> Result:
    chosen = TrainOptions(**{"max_steps": steps, "tokens_per_step": 64, **options})
    return fit(model, adapter, packed_batches(), options=chosen, callbacks=callbacks)


def test_it_says_what_trains_and_how_many_tokens_carry_loss() -> None:
    model, adapter = model_and_adapter()
    result = _fit(model, adapter)
    n, sites = sum(p.numel() for p in adapter.parameters()), len(list(adapter.units()))
    assert result.proof == (
        f"all {sites} sites train: {n:,} values with gradients that move them; the base is unchanged; "
        f"{result.history[0]['trained_tokens']:,} tokens of the step carry loss"
    )


def test_an_adapter_that_is_not_active_is_named_with_the_remedy() -> None:
    model, adapter = model_and_adapter()
    activate(model)
    with pytest.raises(DeltatuneError, match=r"step 1: no parameter of adapter 'default' had a gradient.*activate"):
        _fit(model, adapter)


def test_a_site_that_the_loss_does_not_depend_on_is_named() -> None:
    model, adapter = model_and_adapter()
    model.get_submodule(PART).register_forward_hook(lambda m, args, out: out.detach())
    with pytest.raises(DeltatuneError, match=rf"'{PART}.0' had no gradient: the loss does not depend on.*targets"):
        _fit(model, adapter)


def test_a_site_with_gradients_of_zero_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Dead(Init):
        def __call__(self, delta: Any, w: torch.Tensor) -> None:
            nn.init.zeros_(delta.a)

    torch.manual_seed(0)
    model = tiny("llama")
    adapter = attach(model, LoRA(r=2, init=Dead()))
    with pytest.raises(DeltatuneError, match=r"and 11 more had gradients of exactly zero.*another init"):
        _fit(model, adapter)


def test_parameters_too_coarse_to_move_are_named() -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = attach(model, LoRA(r=2), dtype=torch.bfloat16)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(1.0)
    with pytest.raises(DeltatuneError, match="did not move: a learning rate of 1e-06 is too small for torch.bfloat16"):
        _fit(model, adapter, lr=1e-6)


@dataclass(frozen=True, kw_only=True)
class Meddle(Callback):
    """Writes to the base before the optimizer's step, or after it, which is a method's right."""

    after: bool = False

    def start(self, run: Run) -> Events:
        def write(run: Run) -> None:
            with torch.no_grad():
                run.model.get_parameter("model.norm.weight").add_(1)

        events = Events()
        setattr(events, "on_step_end" if self.after else "on_grads", write)
        return events


def test_a_base_that_changes_is_named() -> None:
    with pytest.raises(DeltatuneError, match="the frozen base changed: 'model.norm.weight'"):
        _fit(*model_and_adapter(), callbacks=[Meddle()])
    assert _fit(*model_and_adapter(), callbacks=[Meddle(after=True)]).step == 1


def test_frozen_factors_are_not_asked_to_train() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Freeze(Callback):
        def start(self, run: Run) -> Events:
            events = Events()

            def freeze(run: Run) -> None:
                for role, p in run.adapter.roles():  # type: ignore[union-attr]
                    p.requires_grad_(role != "down")

            events.on_train_start = freeze  # type: ignore[method-assign]
            return events

    model, adapter = model_and_adapter()
    down = {n: p.detach().clone() for n, p in adapter.named_parameters() if n.endswith(".a")}
    proof = _fit(model, adapter, callbacks=[Freeze()]).proof
    n = sum(p.numel() for role, p in adapter.roles() if role == "up")
    assert proof is not None and f"{n:,} values" in proof
    assert all(torch.equal(p, down[n]) for n, p in adapter.named_parameters() if n in down)


@dataclass(frozen=True, kw_only=True)
class Rest(Callback):
    """Lets a site rest until `step`."""

    step: int

    def start(self, run: Run) -> Events:
        site = run.model.get_submodule(PART)
        site.register_forward_hook(lambda m, args, out: out.detach() if run.step < self.step else out)
        return Events()


def test_a_site_that_a_callback_lets_rest_has_ten_steps() -> None:
    result = _fit(*model_and_adapter(), callbacks=[Rest(step=4)], steps=5)
    assert result.proof is not None and result.proof.startswith("all 14 sites train")
    with pytest.raises(DeltatuneError, match="stopped at step 10: .*'model.layers.1.mlp.down_proj.0' had no gradient"):
        _fit(*model_and_adapter(), callbacks=[Rest(step=99)], steps=12)


def test_tokens_that_carry_no_loss_are_named() -> None:
    model, adapter = model_and_adapter()
    silent = Batches([Example([5, 6, 7], [-100] * 3, "s.jsonl:3")], batch_size=1)
    with pytest.raises(DeltatuneError, match="step 1: no token carries loss in s.jsonl:3"):
        fit(model, adapter, silent, options=TrainOptions(max_steps=1, batch_size=1))


def test_checksums_see_every_precision_and_a_single_change() -> None:
    model = nn.ModuleDict({"a": nn.Linear(7, 9), "b": nn.Linear(300, 400).bfloat16(), "e": nn.Embedding(1, 1)})
    before = checksums(model, set())
    assert set(before) == {"a.weight", "a.bias", "b.weight", "b.bias", "e.weight"}
    with torch.no_grad():
        model["b"].weight[0, 0] += 1  # type: ignore[index]
    changed = {k for k, v in checksums(model, set()).items() if v != before[k]}
    assert changed == {"b.weight"}
    assert "a.weight" not in checksums(model, {id(model["a"].weight)})
