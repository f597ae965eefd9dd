"""What a run writes down: `metrics.jsonl`, a loss curve, TensorBoard by option, and a progress bar."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from deltatune.core.adapter import write_atomically
from deltatune.core.errors import DeltatuneError

Record = dict[str, Any]
Report = Callable[[Mapping[str, Any]], None]
METRICS, CURVE = "metrics.jsonl", "loss.png"


class Log:
    """`metrics.jsonl`, one JSON object a line, in order of `step`.

    What was written after `step`, and a line cut short by a crash, are removed first: a resumed run repeats them."""

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.path = folder / METRICS
        self.board = _board(folder / "tensorboard", step) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(map(_line, kept)).encode())
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            self.file.write(_line(record))
            self.file.flush()
        except OSError as e:
            raise DeltatuneError(f"{self.path}: could not be written ({e.strerror}); make room and resume") from e
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Makes sure that a checkpoint never outlives the lines before it."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # what a full disk refused has been reported by `write`
            self.file.close()
        if self.board is not None:
            self.board.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, up to the first damaged line; none if there is no such file."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise DeltatuneError("train.tensorboard: the package is missing; pip install 'deltatune[track]'") from e
    return SummaryWriter(str(folder), purge_step=step + 1)


def memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the accelerator's memory, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def draw(records: list[Record], path: Path, title: str = "") -> Path | None:
    """The loss of training and of evaluation by step, as a PNG; None when there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if not train and not held_out:
        return None
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    if len(train) >= 30:
        axes.plot(*zip(*train, strict=True), color="#9db8d6", linewidth=0.8, label="training, each step")
        axes.plot(*zip(*_smooth(train), strict=True), color="#1f5c99", linewidth=1.8, label="training, smoothed")
    elif train:
        axes.plot(*zip(*train, strict=True), color="#1f5c99", linewidth=1.6, marker=".", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#d1672c", linewidth=1.6, marker="o", ms=4, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = BytesIO()
    canvas.print_png(picture)
    write_atomically(path, picture.getvalue())
    return path


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A mean over a window of a fifteenth of the run, centred, and narrower at the ends."""
    half, losses = max(1, len(points) // 30), [loss for _, loss in points]
    near = [losses[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, near, strict=True)]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on the terminal's error stream, to be given to `fit` as `report`: steps, loss, tokens/s, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    told = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))  # a narrow terminal cuts it at its end
    columns = (BarColumn(bar_width=12), TimeRemainingColumn(compact=True), told)
    shown: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, text="")

        def report(record: Mapping[str, Any]) -> None:
            if "note" in record:
                progress.console.print(record["note"], markup=False, highlight=False)
                return
            shown.update(record)
            if "memory" in record:
                shown["gigabytes"] = record["memory"] / 1e9
            text = " ".join(
                form.format(shown[name])
                for name, form in (
                    ("step", "{:,}"), ("steps", "of {:,}"), ("loss", "loss {:.4f}"),
                    ("eval_loss", "eval {:.4f}"), ("eval_accuracy", "right {:.1%}"),
                    ("tokens_per_second", "{:,.0f} tok/s"), ("gigabytes", "{:.1f} GB"),
                )
                if name in shown
            )  # fmt: skip
            progress.update(task, completed=record["step"], total=shown.get("steps"), text=text)

        yield report
