from __future__ import annotations

import errno
import json
import random
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import losses, model_and_adapter, packed_batches, whole_run
from torch import Tensor

from deltatune.core import Callback, Events, Run, attach
from deltatune.core.errors import DeltatuneError
from deltatune.methods.lora import LoRA
from deltatune.models.tiny import tiny
from deltatune.train import checkpoint
from deltatune.train.checkpoint import Checkpoints, Snapshot
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions


def _snapshot(step: int, best: int | None = None) -> Snapshot:
    state = {"step": step, "best": None if best is None else {"step": best, "eval_loss": 1.0}}
    return Snapshot(state, {"weights": {"w": torch.full((1000,), float(step))}, "optimizer": {}, "callbacks": {}})


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Dropout, packed batches, evaluation; SIGKILL from outside, wherever the run then is."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    model, adapter, _ = whole_run(whole)
    want = losses(whole)
    assert len(want) == 24

    at = random.SystemRandom().randrange(6, 20)
    command = [sys.executable, str(Path(__file__).with_name("runs.py")), str(killed), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(at):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    saved = Checkpoints(killed)["last"]
    assert saved is not None and int(saved.name.removeprefix("step-")) < 24
    *_, result = whole_run(killed, resume=True)
    assert result.history[0]["step"] == int(saved.name.removeprefix("step-")) + 1
    assert losses(killed) == want, f"killed at step {at}"
    again = checkpoint.read(killed / "checkpoints" / "step-24")
    for k, t in checkpoint.read(whole / "checkpoints" / "step-24").tensors["weights"].items():
        assert torch.equal(t, again.tensors["weights"][k])
    assert result.tokens == again.state["tokens"] == checkpoint.read(whole / "checkpoints" / "step-24").state["tokens"]


@dataclass(frozen=True, kw_only=True)
class Noise(Callback):
    """Scales the loss by a state that it draws and carries along."""

    def start(self, run: Run) -> Events:
        return _Noise()


class _Noise(Events):
    def __init__(self) -> None:
        self.scale = torch.ones(2)

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        return loss * self.scale.prod()

    def on_step_end(self, run: Run) -> None:
        self.scale = self.scale * (1 + 0.1 * torch.rand(2) + 0.05 * random.random() + 0.05 * float(np.random.rand()))

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale = state["scale"]


def test_callbacks_and_all_generators_resume(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    *_, whole = whole_run(None, steps=8, callbacks=[Noise(), Noise()])

    def stop(record: Any) -> None:
        if record.get("step") == 7:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        whole_run(folder, steps=8, callbacks=[Noise(), Noise()], report=stop)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    *_, rest = whole_run(folder, steps=8, resume=True, callbacks=[Noise(), Noise()])
    assert [r["step"] for r in rest.history] == [7, 8]  # from step 6, saved as the best so far
    for found, want in zip(rest.history, whole.history[6:], strict=True):
        assert (found["loss"], found["grad_norm"]) == (want["loss"], want["grad_norm"])


def test_a_whole_model_resumes_too(tmp_path: Path) -> None:
    def run(output: Path, resume: bool = False, report: Any = None) -> Any:
        torch.manual_seed(0)
        model = tiny("llama")
        options = TrainOptions(max_steps=4, tokens_per_step=128, save_every=2, lr=1e-3)
        fit(model, None, packed_batches(), options=options, output=output, resume=resume, report=report)
        return model

    def stop(record: Any) -> None:
        if record.get("step") == 3:
            raise RuntimeError

    want = run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", report=stop)
    found = run(tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), want.parameters(), strict=True))


def test_the_last_two_and_the_best_are_kept_and_nothing_is_pickled(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, best in ((1, 1), (2, 2), (3, 2), (10, 2), (11, 2)):
        checkpoints.save(_snapshot(step, best))
    names = {p.name for p in checkpoints.folder.iterdir()}
    assert names == {"step-2", "step-10", "step-11", "best", "last"}
    assert (checkpoints["best"], checkpoints["last"]) == (checkpoints.folder / "step-2", checkpoints.folder / "step-11")
    files = {p.name for p in (checkpoints.folder / "step-11").iterdir()}
    assert files == {"weights.safetensors", "optimizer.safetensors", "callbacks.safetensors", "state.json"}
    assert checkpoint.read(checkpoints.folder / "step-2").tensors["weights"]["w"][0] == 2


@pytest.mark.parametrize("where", ["save_file", "_sync"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_snapshot(1))
    real, calls = getattr(checkpoint, where), []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(DeltatuneError, match=r"step-2: .*\(No space left on device\); .*step-1 is unchanged"):
        checkpoints.save(_snapshot(2))
    monkeypatch.undo()
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step-1", "last"}
    assert checkpoint.read(checkpoints["last"]).tensors["weights"]["w"][0] == 1  # type: ignore[arg-type]
    checkpoints.save(_snapshot(2))
    assert checkpoints["last"] == checkpoints.folder / "step-2"


def test_a_checkpoint_appears_whole_by_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, seen = Checkpoints(tmp_path), []
    real = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.name, target.exists(), sorted(p.name for p in self.iterdir())))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    path = checkpoints.save(_snapshot(1))
    assert seen == [("step-1", False, sorted(p.name for p in path.iterdir()))]


def test_a_real_limit_on_file_size_is_met_while_training(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the second checkpoint may not write what the first could."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(record: Any) -> None:
        if record.get("step") == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(DeltatuneError, match="step-6: the checkpoint could not be written .*step-5 is unchanged"):
            whole_run(tmp_path, steps=12, report=report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-5", "last"}
    *_, rest = whole_run(tmp_path, steps=12, resume=True)
    assert rest.step == 12 and rest.history[0]["step"] == 6


def test_a_checkpoint_written_again_replaces_one_that_a_crash_left(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(_snapshot(1))
    (checkpoints.folder / "step-2").mkdir()
    (checkpoints.folder / ".step-2.abc").mkdir()
    checkpoints.save(_snapshot(2))
    assert checkpoint.read(checkpoints.folder / "step-2").state["step"] == 2
    assert not list(checkpoints.folder.glob(".step*"))


def test_a_damaged_or_newer_checkpoint_is_named(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(_snapshot(1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(DeltatuneError, match="step-1: format 2 is newer"):
        checkpoint.read(path)
    (path / "state.json").write_text(json.dumps(state))
    weights = path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DeltatuneError, match="step-1: not a whole checkpoint"):
        checkpoint.read(path)


def test_resume_refuses_what_would_not_be_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(DeltatuneError, match="holds no checkpoint; start the run without resume"):
        whole_run(tmp_path, resume=True)
    whole_run(tmp_path, steps=2)
    with pytest.raises(DeltatuneError, match=r"holds a run \(step-2\); resume it"):
        whole_run(tmp_path, steps=2)
    with pytest.raises(DeltatuneError, match=r"lr was 0.005 in the saved run and is 0.1 now"):
        whole_run(tmp_path, steps=2, resume=True, lr=0.1)
    with pytest.raises(DeltatuneError, match=r"callbacks was \[\] in the saved run and is \['Noise'\] now"):
        whole_run(tmp_path, steps=2, resume=True, callbacks=[Noise()])
    *_, result = whole_run(tmp_path, steps=2, resume=True, log_every=2)
    assert result.step == 2 and result.history == [] and (result.proof or "").startswith("all 14 sites train")
    model, adapter = model_and_adapter(dropout=0.1, alpha=8.0)
    options = TrainOptions(max_steps=2, lr=5e-3, tokens_per_step=128, eval_every=6)
    with pytest.raises(DeltatuneError, match="method was"):
        held_out = packed_batches()
        fit(model, adapter, packed_batches(), eval_batches=held_out, options=options, output=tmp_path, resume=True)


def test_resume_refuses_another_base_and_other_data(tmp_path: Path) -> None:
    options = TrainOptions(max_steps=2, tokens_per_step=128)
    fit(*model_and_adapter(), packed_batches(), options=options, output=tmp_path)
    with pytest.raises(DeltatuneError, match="the examples, the seed, or the batch settings are not those"):
        fit(*model_and_adapter(), packed_batches(seed=1), options=options, output=tmp_path, resume=True)
    torch.manual_seed(1)
    model = tiny("llama")
    with pytest.raises(DeltatuneError, match="the base model is not the one"):
        fit(model, attach(model, LoRA(r=4)), packed_batches(), options=options, output=tmp_path, resume=True)


def test_the_optimizers_whole_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
        groups: list[dict[str, Any]] = [{"params": parameters[:1], "lr": 0.1, "initial_lr": 0.3}]
        groups += [{"params": parameters[1:], "betas": (0.5, 0.9)}]
        return parameters, torch.optim.AdamW(groups)

    def steps(parameters: Any, optimizer: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            parameters[0].square().sum().backward()  # the second has no state yet
            optimizer.step()

    parameters, optimizer = make()
    steps(parameters, optimizer)
    values, rest = checkpoint.optimizer_state(optimizer)
    values = {k: t.clone() for k, t in values.items()}
    twins, other = make()
    for p, q in zip(parameters, twins, strict=True):
        q.data.copy_(p.data)
    checkpoint.restore_optimizer(other, values, json.loads(json.dumps(rest)))
    steps(parameters, optimizer)
    steps(twins, other)
    assert all(torch.equal(p, q) for p, q in zip(parameters, twins, strict=True))
    assert other.param_groups[0]["initial_lr"] == 0.3 and other.param_groups[1]["betas"] == (0.5, 0.9)
