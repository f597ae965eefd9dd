from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import documents, model_and_adapter

import deltatune as dt
from deltatune.core import Callback, Events, Run
from deltatune.core.errors import DeltatuneError
from deltatune.data import Batches
from deltatune.models.tiny import tiny
from deltatune.train import checkpoint
from deltatune.train.checkpoint import Checkpoints, Snapshot
from deltatune.train.loop import fit
from deltatune.train.metrics import read
from deltatune.train.options import TrainOptions
from deltatune.train.process import Processes


@dataclass(frozen=True, kw_only=True)
class Watch(Callback):
    """Writes a line a step: the blocks that it changed, and a checksum of every weight."""

    file: str
    rank: int

    def start(self, run: Run) -> Events:
        torch.rand(1 + self.rank)  # from here on each process draws other random numbers
        return _Watched(Path(self.file), run)


class _Watched(Events):
    def __init__(self, file: Path, run: Run) -> None:
        self.file, self.sums = file, _sums(run.model)

    def on_step_end(self, run: Run) -> None:
        before, self.sums = self.sums, _sums(run.model)
        changed = {n.split(".")[2] if ".layers." in n else "outside" for n, s in self.sums.items() if s != before[n]}
        with self.file.open("a") as lines:
            lines.write(json.dumps([*sorted(changed), self.sums]) + "\n")


def _sums(model: torch.nn.Module) -> dict[str, int]:
    return {name: zlib.crc32(p.detach().numpy().tobytes()) for name, p in model.named_parameters()}


def _run(output: Path, kind: str, rank: int = 0, world: int = 1) -> None:
    model, adapter = model_and_adapter()
    options, callbacks = TrainOptions(max_steps=4, batch_size=8, lr=1e-2, eps=1e-4, eval_every=2, save_every=3), []
    if kind == "lisa":
        model, adapter = tiny("llama", num_hidden_layers=4), None
        options = TrainOptions(max_steps=8, batch_size=8, lr=1e-3, eps=1e-4, schedule="constant")
        watch = Watch(file=f"{output}-{rank}.jsonl", rank=rank)
        callbacks = [watch, dt.LISA(layers=1, every=2)]
    if rank:  # what a process began with does not matter
        with torch.no_grad():
            for p in (adapter or model).parameters():
                p.normal_()
    rows = documents(24, seed=4)
    batches, held_out = (Batches(rows, batch_size=2, rank=rank, world=world) for _ in range(2))
    fit(model, adapter, batches, eval_batches=held_out, options=options, callbacks=callbacks, output=output)


def _one_and_two(folder: Path, kind: str) -> list[Snapshot]:
    """The last checkpoints of a run of one process and of one of two."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, str(folder / "two"), kind]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [os.environ | shared | {"RANK": r, "LOCAL_RANK": r} for r in "01"]
    with ExitStack() as stack:
        both = [stack.enter_context(subprocess.Popen(command, env=env, stderr=subprocess.PIPE)) for env in ranks]
        for process in both:
            stack.callback(process.kill)
        _run(folder / "one", kind)
        for process in both:
            _, err = process.communicate(timeout=200)
            assert process.returncode == 0, err.decode()[-2000:]
    return [checkpoint.read(Checkpoints(folder / name)["last"]) for name in ("one", "two")]


def _close(one: Snapshot, two: Snapshot) -> None:
    for k, t in one.tensors["weights"].items():
        torch.testing.assert_close(two.tensors["weights"][k], t, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    saved = _one_and_two(tmp_path, "lora")
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["tokens"], a["trained_tokens"]) == (b["step"], b["tokens"], b["trained_tokens"])
        assert {k: b[k] for k in a if "loss" in k or k == "grad_norm"} == pytest.approx(
            {k: a[k] for k in a if "loss" in k or k == "grad_norm"}, rel=1e-5
        )
    assert len(saved[1].state["random"]) == 2
    _close(*saved)


@pytest.mark.slow
def test_two_processes_draw_the_same_blocks_of_lisa(tmp_path: Path) -> None:
    """Step by step the ranks change the same block, that of a run of one, and hold the same weights bit for bit."""
    saved = _one_and_two(tmp_path, "lisa")
    one, first, second = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("one-0", "two-0", "two-1"))
    assert first == second and len(first) == 8
    blocks = [json.loads(line)[:-1] for line in first]
    assert blocks == [json.loads(line)[:-1] for line in one]
    assert blocks[::2] == blocks[1::2] and len({block for block, _ in blocks}) > 1  # four periods, not of one draw
    assert all(block in "0123" and outside == "outside" for block, outside in blocks)
    _close(*saved)


def test_sharded_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DistributedType

    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr("deltatune.train.process.Accelerator", Sharded)
    with pytest.raises(DeltatuneError, match="FSDP shards the model, which this loop does not do"):
        Processes()


if __name__ == "__main__":
    found: Any = Processes()
    _run(Path(sys.argv[1]), sys.argv[2], found.rank, found.world)
