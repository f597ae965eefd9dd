"""The rows of a comparison as files: compare.csv, compare.md and compare.png."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from deltatune.core.adapter import write_atomically
from deltatune.train.compare import Row, best

Cell = Callable[[Any], str]
_MERGES, _APART = "#1f5c99", "#d1672c"  # colours
_OVERHEAD = "time per token over that of LoRA"  # where the comparison has LoRA


def _size(n: int) -> str:
    size, unit = (n / 2**10, "KiB") if n < 2**20 else (n / 2**20, "MiB") if n < 2**30 else (n / 2**30, "GiB")
    return f"{size:,.1f} {unit}"


_COLUMNS: tuple[tuple[str, str, Cell], ...] = (
    ("lr", "rate", "{:.2g}".format),
    ("eval_loss", "eval loss", "{:.4f}".format),
    ("eval_accuracy", "accuracy", "{:.1%}".format),
    ("trained", "trained", "{:,}".format),
    ("file", "file", _size),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    (_OVERHEAD, "time / LoRA", "{:.2f}".format),
    ("peak", "memory", _size),
    ("merges", "merges", {True: "yes", False: "no"}.__getitem__),
    ("steps", "steps", "{:,}".format),
    ("seconds", "time", "{:,.1f} s".format),
)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(titles, cells of the finished rows); columns that no row has are left out."""
    # the base untrained has no learning rate
    finished = [row if row.trained else dataclasses.replace(row, lr=None) for row in rows if row.failed is None]
    lora = next((row.tokens_per_second for row in finished if row.method == "LoRA"), None)

    def value(row: Row, name: str) -> Any:
        if name != _OVERHEAD:
            return getattr(row, name)
        return lora / row.tokens_per_second if lora and row.tokens_per_second else None

    columns = [c for c in _COLUMNS if any(value(row, c[0]) is not None for row in finished)]
    cells = [
        [row.method, *("" if (v := value(row, n)) is None else form(v) for n, _, form in columns)] for row in finished
    ]
    return ["method", *(title for _, title, _ in columns)], cells


def write(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """The files that were written; no picture when nothing was trained. Of several learning rates of a method the
    page and the picture have the best."""
    text = StringIO()
    names = [f.name for f in dataclasses.fields(Row) if f.name != "key"]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    write_atomically(folder / "compare.csv", text.getvalue().encode())
    shown = best(rows)
    write_atomically(folder / "compare.md", markdown(shown, title).encode())
    written = [folder / "compare.csv", folder / "compare.md"]
    if (picture := draw(shown, title)) is not None:
        write_atomically(folder / "compare.png", picture)
        written.append(folder / "compare.png")
    return written


def markdown(rows: Sequence[Row], title: str) -> str:
    titles, cells = table(rows)
    lines = [f"# {title}", ""]
    if cells:
        lines += [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)]), *map(_line, cells), ""]
    if failed := [f"- {row.method}: {row.failed}" for row in rows if row.failed is not None]:
        lines += ["Not trained:", "", *failed, ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def draw(rows: Sequence[Row], title: str) -> bytes | None:
    """Quality against trained parameters and against time, as a PNG; a method's number is its place in the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    finished = [row for row in rows if row.failed is None and row.trained is not None]
    base = next((row for row in rows if row.failed is None and row.trained is None), None)
    if not finished:
        return None
    accurate = all(row.eval_accuracy is not None for row in finished)
    heights = [float(row.eval_accuracy if accurate else row.eval_loss) for row in finished]  # type: ignore[arg-type]
    colours = [_MERGES if row.merges else _APART for row in finished]
    figure = Figure(figsize=(13, max(4.8, 1.6 + 0.17 * len(finished))), dpi=130, layout="constrained")
    both = (("trained", "trained parameters", "log"), ("seconds", "seconds of training", "linear"))
    sides = [side for side in both if all(getattr(row, side[0]) is not None for row in finished)]
    canvas, (*axes, key) = (
        FigureCanvasAgg(figure),
        figure.subplots(1, len(sides) + 1, width_ratios=(*(1 for _ in sides), 0.35)),
    )
    for side, (name, label, scale) in zip(axes, sides, strict=True):
        side.set_xscale(scale)
        side.scatter([getattr(row, name) for row in finished], heights, s=34, c=colours)
        side.set_xlabel(label)
        if base is not None:
            level = base.eval_accuracy if accurate else base.eval_loss
            side.axhline(level, color="#808080", linewidth=0.9, linestyle="--")
        side.margins(0.08)
        side.grid(color="#e4e4e4", linewidth=0.8)
        side.set_axisbelow(True)
        side.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on held-out rows" if accurate else "loss on held-out rows (nats a token)")
    key.axis("off")
    for i, (row, colour) in enumerate(zip(finished, colours, strict=True), 1):
        key.text(0, 1 - i / (len(finished) + 3), f"{i}  {row.method}", fontsize=8, color=colour, va="center")
    for line, (told, colour) in enumerate((("merges into the base", _MERGES), ("does not", _APART))):
        key.text(0, (1 - line) / (len(finished) + 3), told, fontsize=8, color=colour, va="center", style="italic")
    figure.suptitle(title)
    canvas.draw()
    figure.set_layout_engine("none")  # points stay where the labels are put beside them
    for side, (name, _, _) in zip(axes, sides, strict=True):
        places = [side.transData.transform((getattr(row, name), y)) for row, y in zip(finished, heights, strict=True)]
        for i, ((x, y), at) in enumerate(zip(places, _apart(places), strict=True), 1):
            side.annotate(
                str(i), (x, y), (x + 9, at), xycoords="figure pixels", textcoords="figure pixels", fontsize=8,
                va="center", arrowprops={"arrowstyle": "-", "color": "#b0b0b0", "lw": 0.6} if abs(at - y) > 6 else None,
            )  # fmt: skip
    picture = BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()


def _apart(places: Sequence[tuple[float, float]], height: float = 13, width: float = 26) -> list[float]:
    """The height of each label beside its point, as near as is free."""
    taken: list[tuple[float, float]] = []
    found: dict[int, float] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[i]
        near = (y + sign * step for step in range(10_000) for sign in (1, -1))
        found[i] = next(at for at in near if all(abs(at - b) >= height or abs(x - a) >= width for a, b in taken))
        taken.append((x, found[i]))
    return [found[i] for i in range(len(places))]
