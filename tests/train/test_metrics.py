from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deltatune.core.errors import DeltatuneError
from deltatune.train.metrics import Log, draw, memory, progress_bar, read


def test_lines_are_whole_at_once_and_cut_back_on_resume(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
        assert read(log.path)[-1] == {"step": step, "loss": 1 / step}
    log.close()
    with log.path.open("a") as f:
        f.write('{"step": 6, "lo')
    assert [r["step"] for r in read(log.path)] == [1, 2, 3, 4, 5]
    again = Log(tmp_path, step=3)
    again.write({"step": 4, "loss": 0.5})
    again.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]
    Log(tmp_path).close()
    assert log.path.read_text() == ""


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(DeltatuneError, match=r"metrics.jsonl: could not be written \(No space left on device\)"):
        log.write({"step": 1})
    log.close()


def _has(path: Path, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(Image.open(path).convert("RGB")) == colour).all(-1).any())


def test_the_curve_shows_training_and_evaluation(tmp_path: Path) -> None:
    train = [{"step": i, "loss": 3 / i} for i in range(1, 60)]
    assert draw([], tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()
    draw(train, tmp_path / "train.png", title="law")
    draw([*train, {"step": 60, "eval_loss": 0.4}, {"step": 61, "loss": 0.2, "eval_loss": 0.3}], tmp_path / "both.png")
    blue, orange = (0x1F, 0x5C, 0x99), (0xD1, 0x67, 0x2C)
    assert _has(tmp_path / "train.png", blue) and not _has(tmp_path / "train.png", orange)
    assert _has(tmp_path / "both.png", blue) and _has(tmp_path / "both.png", orange)


def test_memory_is_the_peak_in_bytes() -> None:
    before = memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 5_000_000)
    assert memory(torch.device("cpu")) >= held.nbytes > before
    assert before > 50_000_000


def test_tensorboard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DeltatuneError, match=r"the package is missing; pip install 'deltatune\[track\]'"):
        Log(tmp_path, tensorboard=True)
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((os.path.basename(folder), purge_step))

        def add_scalar(self, *args: Any) -> None:
            written.append(args)

        def close(self) -> None:
            written.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = Log(tmp_path, step=4, tensorboard=True)
    log.write({"step": 5, "loss": 0.5, "lr": 0.1})
    log.close()
    assert written == [("tensorboard", 5), ("loss", 0.5, 5), ("lr", 0.1, 5), "closed"]


def test_the_bar_shows_progress_on_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as report:
        report({"note": "2 sites [train]"})
        report({"step": 3, "steps": 4, "loss": 1.25, "tokens_per_second": 1234.0, "memory": 3_000_000_000})
        report({"step": 4, "steps": 4, "eval_loss": 2.5, "eval_accuracy": 0.5})
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("2 sites [train]", "4 of 4", "loss 1.2500", "eval 2.5000", "right 50.0%", "1,234 tok/s"):
        assert text in err
