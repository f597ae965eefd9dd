"""How a run trains: every option, its default, its unit, and what may not be combined."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltatune.core import Method, Union
from deltatune.core.errors import DeltatuneError, nearest
from deltatune.data.loader import Batches
from deltatune.train.pace import Speed
from deltatune.train.recompute import Recompute

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
TOKENS_PER_STEP = 8192
FULL_LR = 1e-4  # of training every weight of the base
SHARE = 10  # evaluations and checkpoints in a run, where no interval is given


class TrainOptions(BaseModel):
    """Options of `fit`. Raises `DeltatuneError` for an unknown name, a wrong value, or one without effect."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    epochs: Count | None = None
    """Passes over the data; 1 unless `max_steps` is given."""
    max_steps: Count | None = None
    """Optimizer steps, in place of `epochs`."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """By default the one that suits the method, its `lr`; of several methods that of the first; of `full` 1e-4."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int | float = 0.03
    """A whole number: steps. A fraction below 1: that share of all steps, rounded up."""
    tokens_per_step: Count | None = None
    """Tokens per optimizer step, over all micro-batches and processes; 8192 unless `batch_size` is given."""
    batch_size: Count | None = None
    """Rows per optimizer step, in place of `tokens_per_step`."""
    tokens_per_batch: Count | None = None
    """What one forward pass may hold, in tokens; a step of more is accumulated, which changes nothing but memory."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's. What would decay away from the base (scales that start at one, copies of norms and biases) is spared."""
    label_smoothing: Fraction = 0.0
    """The share of each target that is spread evenly over all classes, in the loss of training; not in evaluation."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """In 8 bits its moments take a quarter of the memory; paged, they leave the accelerator when that runs short."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of all gradients together; None leaves them."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What matrix products run in; adapter parameters stay in fp32. auto: bf16 where the processor has it."""
    seed: int = 0
    eval_every: Count | None = None
    """Steps between evaluations; a tenth of the run by default."""
    save_every: Count | None = None
    """Steps between checkpoints; a tenth of the run by default."""
    early_stop: Count | None = None
    """Evaluations in a row without a new best loss after which the run ends."""
    keep: Literal["best", "last"] | None = None
    """The weights that the run leaves in the model; the best if it evaluates and saves, else the last."""
    log_every: Count = 1
    activation_checkpointing: Recompute = "none"
    """What runs again in the backward pass, to keep fewer activations: nothing; whole blocks (also written true), for
    up to half more time; or products: what lies between the matrix products of a block, for little time."""
    speed: Speed = "auto"
    """Whether blocks run as they are (eager) or through torch.compile, after a warm-up of minutes; auto: compiled in
    runs of hours, if steps of either kind, timed, say that it is faster. Compiled, sums differ in their last digits."""
    tensorboard: bool = False

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as e:
            raise DeltatuneError("; ".join(_told(problem, type(self).model_fields) for problem in e.errors())) from None

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _switched(cls, given: Any) -> Any:
        return given if not isinstance(given, bool) else "blocks" if given else "none"

    @model_validator(mode="after")
    def _apart(self) -> Self:
        for one, other in (("epochs", "max_steps"), ("tokens_per_step", "batch_size")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} say the same thing twice; give one of them")
        if self.speed == "compile" and self.activation_checkpointing != "none":
            raise ValueError("speed: compile compiles nothing of blocks that are recomputed; leave one of them out")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise ValueError(f"warmup is a whole number of steps or a fraction below 1, got {self.warmup}")
        step, batch = self.tokens_per_step or TOKENS_PER_STEP, self.tokens_per_batch
        if self.batch_size is None and batch is not None and batch > step:
            raise ValueError(f"tokens_per_batch ({batch}) is more than tokens_per_step ({step}); lower it")
        return self

    def rated(self, method: Method | None) -> Self:
        """With a learning rate: that of `method`, None for every weight, where none is given."""
        if self.lr is not None:
            return self
        while type(method) is Union:
            method = method.methods[0]
        return self.model_copy(update={"lr": FULL_LR if method is None else method.lr})

    def check(self, *, evaluates: bool, output: Path | None) -> None:
        """Raises for an option that this run gives no effect: of evaluation without data, of files without a folder."""
        for name in ("eval_every", "early_stop"):
            if getattr(self, name) is not None and not evaluates:
                raise DeltatuneError(f"train.{name} has no effect without evaluation data; give some, or leave it out")
        for name in ("save_every", "tensorboard"):
            if getattr(self, name) and output is None:
                raise DeltatuneError(f"train.{name} has no effect without an output folder; give one, or leave it out")
        if self.keep == "best" and not (evaluates and output):
            raise DeltatuneError("train.keep: best needs evaluation data and an output folder; give them, or drop it")

    def batching(self, capacity: int, world: int = 1) -> dict[str, int]:
        """The size of a micro-batch, as an argument of `Batches`: `tokens_per_batch`, or `batch_size` in rows.

        capacity: tokens of the longest row. Rows per step stay exact: they are split into equal micro-batches."""
        if self.batch_size is None:
            share = (self.tokens_per_step or TOKENS_PER_STEP) // world
            return {"tokens_per_batch": self.tokens_per_batch or max(share, capacity)}
        if self.batch_size % world:
            raise DeltatuneError(f"train.batch_size: {self.batch_size} rows cannot be shared by {world} processes")
        rows = self.batch_size // world
        fit = max(1, self.tokens_per_batch // capacity) if self.tokens_per_batch else rows
        return {"batch_size": max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fit)}

    def accumulation(self, batches: Batches) -> int:
        """Micro-batches of one process in an optimizer step."""
        if self.batch_size is not None:
            rows = (batches.batch_size or 0) * batches.world
            if not rows or self.batch_size % rows:
                held = f"{batches.batch_size} rows" if batches.batch_size else f"{batches.tokens_per_batch} tokens"
                raise DeltatuneError(
                    f"train.batch_size: {self.batch_size} rows a step cannot be made of batches of {held} "
                    f"from {batches.world} processes; make the batches with options.batching()"
                )
            return self.batch_size // rows
        budget = batches.tokens_per_batch or (batches.batch_size or 1) * batches.capacity
        return max(1, round((self.tokens_per_step or TOKENS_PER_STEP) / (budget * batches.world)))

    def count(self, batches: Batches) -> tuple[int, int]:
        """(optimizer steps, micro-batches of one process) in the whole run."""
        each = self.accumulation(batches)
        total = batches.count(self.epochs or 1) if self.max_steps is None else self.max_steps * each
        return math.ceil(total / each), total

    def factor(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at `step`, counted from 1 to `steps`.

        step / warmup up to the peak, which is reached at the last step of the warm-up; then 1, or towards 0 along a
        line or half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5), which `steps + 1` would reach."""
        warmup = self.warmup if isinstance(self.warmup, int) else math.ceil(self.warmup * steps)
        peak = max(1, warmup)
        if step < peak:
            return step / peak
        done = (step - peak) / max(1, steps - peak + 1)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]

    def dtype(self, device: torch.device) -> torch.dtype:
        """What matrix products run in on `device`: torch.bfloat16 or torch.float32."""
        native = has_bf16(device) if self.precision == "auto" else self.precision == "bf16"
        return torch.bfloat16 if native else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 matrices itself; emulated, they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _told(problem: Any, known: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"][:1])
    if problem["type"] == "extra_forbidden":
        return f"train has no option {name!r}{nearest(name, known) or '; its options are ' + ', '.join(known)}"
    what = str(problem["msg"]).removeprefix("Value error, ")
    return f"train.{name}: {what[0].lower() + what[1:]}, got {problem['input']!r}" if name else f"train: {what}"
