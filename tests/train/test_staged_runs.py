"""Callbacks that train in stages, under `fit`: cut and resumed, the base untouched, the adapter the whole change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import documents, losses, packed_batches

import deltatune as dt
from deltatune.core import Callback, Events, Run
from deltatune.data import Batches
from deltatune.models.tiny import inputs, tiny
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions

STEPS = 14
CALLBACKS: dict[str, list[Callback]] = {
    "relora": [dt.ReLoRA(every=4, warmup=2, restart=2, prune=0.5, prune_by="random")],
    "relora, magnitude": [dt.ReLoRA(every=3, warmup=2, restart=1)],
    "periodic": [dt.PeriodicLoRA(every=4, m=0.3)],
    "periodic, plain": [dt.PeriodicLoRA(every=4, m=1)],
    "chain": [dt.ChainOfLoRA(links=3, ranks=(4, 2, 3), schedule="link")],
    "delta": [dt.DeltaLoRA(start_steps=5)],
    "delta, at once": [dt.DeltaLoRA(start_steps=0)],
    "lora-fa": [dt.LoRAFA()],
    "lora-fa in cycles, lora+": [dt.LoRAFA(), dt.ReLoRA(every=4, warmup=2, restart=2), dt.LoRAPlus(ratio=4)],
}


def trained(name: str, output: Path, resume: bool = False, report: Any = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = dt.attach(model, dt.LoRA(r=4, dropout=0.0 if name.startswith("delta") else 0.1))
    options = TrainOptions(max_steps=STEPS, lr=5e-3, tokens_per_step=128, eval_every=5, save_every=4, keep="last",
                           schedule="constant")  # fmt: skip
    fit(model, adapter, packed_batches(), eval_batches=Batches(documents(6, seed=9), batch_size=3), output=output,
        options=options, resume=resume, report=report, callbacks=CALLBACKS[name])  # fmt: skip
    return model, adapter


QUICK = ("relora", "periodic", "chain", "delta")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CALLBACKS]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Any]]:
    """(folder, model, adapter) of the whole run, once for each name."""

    @cache
    def run(name: str) -> tuple[Path, Any, Any]:
        folder = tmp_path_factory.mktemp("whole")
        return folder, *trained(name, folder)

    return run


@pytest.mark.parametrize("cut", [7, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_cut_goes_on_bit_for_bit(name: str, cut: int, unbroken: Any, tmp_path: Path) -> None:
    """Cut after checkpoints that fall at the end of a stage and within one."""

    def stop(record: Any) -> None:
        if record.get("step") == cut:
            raise RuntimeError("power cut")

    folder, _, whole = unbroken(name)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(name, tmp_path / "cut", report=stop)
    _, rest = trained(name, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(folder)
    want, found = whole.state_dict(), rest.state_dict()
    assert want.keys() == found.keys() and all(torch.equal(t, found[k]) for k, t in want.items())
    assert any("constant" in k for k in want) or name == "lora-fa"


@pytest.mark.parametrize("name", NAMES)
def test_the_base_rests_and_the_adapter_is_the_whole_change(name: str, unbroken: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny("llama")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    _, model, adapter = unbroken(name)
    want = model.eval()(**inputs(model)).logits
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if "adapters" not in k.split("."))
    assert all(p.requires_grad for p in adapter.parameters())
    adapter.save(tmp_path)
    dt.load(base, tmp_path)
    torch.testing.assert_close(base.eval()(**inputs(base)).logits, want, rtol=1e-4, atol=1e-5)
    dt.activate(base)
    assert (base(**inputs(base)).logits - want).abs().max() > 1e-2


@dataclass(frozen=True, kw_only=True)
class Spoil(Callback):
    """Ruins the weights from step 8 on."""

    def start(self, run: Run) -> Events:
        events = Events()
        events.on_step_end = self.ruin  # type: ignore[method-assign]
        return events

    @torch.no_grad()
    def ruin(self, run: Run) -> None:
        for p in run.adapter.parameters() if run.step >= 8 else ():
            p.add_(1.0)


def test_the_best_checkpoint_of_an_earlier_stage_comes_back(tmp_path: Path) -> None:
    """Its constant is smaller than the one that training ended with."""
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = dt.attach(model, dt.LoRA(r=4))
    options = TrainOptions(max_steps=12, lr=5e-3, tokens_per_step=128, eval_every=1, schedule="constant")
    result = fit(model, adapter, packed_batches(), eval_batches=Batches(documents(6, seed=9), batch_size=3),
                 output=tmp_path, options=options, callbacks=[dt.PeriodicLoRA(every=3), Spoil()])  # fmt: skip
    assert 3 <= result.kept == result.best["step"] < 8 and result.step == 12
    stages = result.kept // 3
    sizes = {t.shape[1] for k, t in adapter.state_dict().items() if k.endswith("constant.up")}
    assert sizes == {4 * stages}


def test_lisa_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(output: Path, resume: bool = False, report: Any = None) -> Any:
        torch.manual_seed(0)
        model = tiny("llama", num_hidden_layers=4)
        options = TrainOptions(max_steps=9, tokens_per_step=128, save_every=2, lr=1e-3)
        fit(model, None, packed_batches(), options=options, output=output, resume=resume, report=report,
            callbacks=[dt.LISA(layers=2, every=3)])  # fmt: skip
        return model

    def stop(record: Any) -> None:
        if record.get("step") == 8:
            raise RuntimeError

    want = run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", report=stop)
    found = run(tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), want.parameters(), strict=True))
