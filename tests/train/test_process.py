from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import documents, model_and_adapter

from deltatune.core.errors import DeltatuneError
from deltatune.data import Batches
from deltatune.train import checkpoint
from deltatune.train.loop import fit
from deltatune.train.metrics import read
from deltatune.train.options import TrainOptions
from deltatune.train.process import Processes


def _run(output: Path, rank: int = 0, world: int = 1, resume: bool = False) -> None:
    model, adapter = model_and_adapter()
    if rank:  # what a process began with does not matter
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
    rows = documents(24, seed=4)
    options = TrainOptions(max_steps=4, batch_size=8, lr=1e-2, eps=1e-4, eval_every=2, save_every=3)
    batches, held_out = (Batches(rows, batch_size=2, rank=rank, world=world) for _ in range(2))
    fit(model, adapter, batches, eval_batches=held_out, options=options, output=output, resume=resume)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, str(tmp_path / "two")]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [os.environ | shared | {"RANK": r, "LOCAL_RANK": r} for r in "01"]
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for env in ranks]
    _run(tmp_path / "one")
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err.decode()[-2000:]
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["tokens"], a["trained_tokens"]) == (b["step"], b["tokens"], b["trained_tokens"])
        assert {k: b[k] for k in a if "loss" in k or k == "grad_norm"} == pytest.approx(
            {k: a[k] for k in a if "loss" in k or k == "grad_norm"}, rel=1e-5
        )
    saved = [checkpoint.read(tmp_path / name / "checkpoints" / "step-4") for name in ("one", "two")]
    assert len(saved[1].state["random"]) == 2
    for k, t in saved[0].tensors["weights"].items():
        torch.testing.assert_close(saved[1].tensors["weights"][k], t, rtol=1e-4, atol=1e-6)


def test_sharded_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DistributedType

    class Sharded:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr("deltatune.train.process.Accelerator", Sharded)
    with pytest.raises(DeltatuneError, match="FSDP shards the model, which this loop does not do"):
        Processes()


if __name__ == "__main__":
    found: Any = Processes()
    _run(Path(sys.argv[1]), found.rank, found.world)
