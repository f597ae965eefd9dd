"""How much memory a run needs, by part, before any weight is loaded; and how much it took.

One training step is run without data: tensors on the device "meta" have shapes and no storage, so the architecture, the
method and the loss are those of the run, whatever they are, and a model of any size is measured in seconds.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.core import DeltatuneError, Method, attach
from deltatune.core.adapter import Adapter
from deltatune.data.encode import IGNORED, Task
from deltatune.data.packing import Batch
from deltatune.kernels.attention import Blocks
from deltatune.kernels.device import standing_for
from deltatune.models import quantise
from deltatune.models.blocks import Unsuitable, blocked
from deltatune.models.fused import fused
from deltatune.train import optimizer
from deltatune.train.head import head_of
from deltatune.train.loss import outcome
from deltatune.train.options import TrainOptions
from deltatune.train.recompute import Recompute, recomputing

META = torch.device("meta")
# What is kept lies between freed intermediates on the heap, where glibc puts every tensor (see `kept_freed`). Resident
# memory then exceeds the sum of tensors by 0.45 to 0.75 of what the blocks keep, or would keep without checkpointing.
SCATTERED = 0.6


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch: `rows` of `length` tokens, of which `trained` carry loss.

    `target` is the length of a decoder's input, if there is an encoder, `blocks` the layout of documents in one row."""

    rows: int
    length: int
    trained: int
    task: Task = "causal"
    target: int = 0
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training step, by what holds them.

    `loss` is a chunk of logits and the gradient made of them, `backward` what the backward pass adds at the peak,
    `allocator` what is lost between tensors, `process` the interpreter and its libraries."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    backward: int
    allocator: int
    process: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    def to_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"total": self.total}

    def __str__(self) -> str:
        named = [f"{name} {_size(n)}" for name, n in self.to_dict().items() if n and name != "total"]
        return f"memory estimate {_size(self.total)}: {', '.join(named)}"


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages by the phase that made them, and keeps the counts at their peak."""

    def __init__(self, held: Iterator[Tensor]) -> None:
        super().__init__()
        self.phase, self.live, self.peak = "activations", Counter[str](), Counter[str]()
        self.phases: dict[int, str] = {}  # storage -> phase
        for t in held:
            self.own(t, "held")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.own(t)
        return out

    def own(self, t: Tensor, phase: str | None = None) -> None:
        """Count a new storage, or move a known one to `phase`."""
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.phases.get(key)
        if known is None:
            weakref.finalize(storage, self._gone, key, size)
        elif phase is None:
            return
        else:
            self.live[known] -= size
        self.phases[key] = now = phase or self.phase
        self.live[now] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _gone(self, key: int, size: int) -> None:
        self.live[self.phases.pop(key)] -= size


_PRODUCTS = {F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm,
             F.conv1d, F.conv2d, torch.addmm, torch.baddbmm}  # fmt: skip


class _Kernels(TorchFunctionMode):
    """What a real device does and "meta" does not: products in `dtype` under autocast, attention without its matrix.

    Whoever asks whether something holds for values is told that it does not: masks then are not found to be of ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        attends = func is F.scaled_dot_product_attention
        if self.dtype is torch.bfloat16 and (attends or func in _PRODUCTS):
            args, kwargs = tuple(map(self._cast, args)), {k: self._cast(v) for k, v in kwargs.items()}
        if attends and not kwargs.get("dropout_p"):
            q, k, v = args[:3] if len(args) > 2 else (kwargs[n] for n in ("query", "key", "value"))
            return _Attention.apply(q, k, v, kwargs.get("attn_mask"))
        return func(*args, **kwargs)

    def _cast(self, x: Any) -> Any:
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention kernel: keeps its inputs, its output, and a number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        added = None if mask is None else mask.to(q.dtype)  # a mask of booleans becomes one that is added
        ctx.save_for_backward(q, k, v, added, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def step(model: Any, adapter: Adapter | None, shape: Shape, dtype: torch.dtype, device: torch.device,
         recompute: Recompute = "none") -> Counter[str]:  # fmt: skip
    """Bytes beside parameters and optimizer at the peak of one step of `model`, which lies on "meta"."""
    batch = _batch(shape)
    parameters = list((model if adapter is None else adapter).parameters())
    held = [*model.parameters(), *model.buffers(), *parameters, *batch.inputs.values()]
    live = _Live(t for t in held if t.device == META)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: live.own(p.grad, "gradients"))  # type: ignore[arg-type]
             for p in parameters if p.requires_grad]  # fmt: skip
    head = head_of(model)
    passes = max((c.passes for c in (() if adapter is None else adapter.callbacks())), default=1)

    def enter(module: nn.Module, args: Any) -> None:
        if module is head or module is model:  # which may run more than once
            live.phase = "loss" if module is head else "activations"

    hooks.append(register_module_forward_pre_hook(enter))  # one at the head itself would change how its loss is made
    model.train()
    model.config.use_cache = False
    layout = nullcontext() if shape.blocks is None else blocked(model)
    try:
        with (recomputing(model, recompute), layout, fused(model), standing_for(device.type, dtype), live,
              _Kernels(dtype)):  # fmt: skip
            seen = outcome(model, batch, shape.task, passes)
            loss = seen.total + sum(logits.sum() for logits in seen.logits)
            live.phase = "backward"
            one = torch.ones((), device=META)  # `loss.backward()` would leave `_Kernels` before recomputing blocks
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        for hook in hooks:
            hook.remove()
        for p in parameters:
            p.grad = None
    del live.peak["held"]
    return live.peak


def _batch(shape: Shape) -> Batch:
    """A batch of that shape. Its labels alone have values, which say what reaches the head."""

    def blank(*size: int) -> Tensor:
        return torch.empty(shape.rows, *size, dtype=torch.long, device=META)

    inputs = {"input_ids": blank(shape.length)}
    inputs |= {"position_ids" if shape.blocks else "attention_mask": blank(shape.length)}
    if shape.task == "seq2seq":
        inputs["decoder_input_ids"] = blank(shape.target)
    labels = torch.full((shape.target if shape.task == "seq2seq" else shape.length, shape.rows), IGNORED)
    labels.view(-1)[-shape.trained :] = 0  # the last of each row: nothing predicts the first
    labels = torch.zeros(shape.rows, dtype=torch.long) if shape.task == "classification" else labels.mT
    return Batch(inputs, labels, labels, [], shape.rows * shape.length, shape.trained, shape.blocks)


def estimate(model: Any, method: Method | None, shape: Shape, options: TrainOptions, *, dtype: torch.dtype,
             device: torch.device, process: int = 0, quantize: str | None = None) -> Estimate:  # fmt: skip
    """The peak of training `method` (None: `model` itself) on `model`, whose parameters lie on "meta".

    dtype: what products run in, on `device`. process: bytes held without model and data, as `held` says.
    quantize: how the base is going to be stored; each product then makes one weight dense, for as long as it takes.
    Raises DeltatuneError where the method decides by values, which this model does not have."""
    base, dense = _bytes(model.parameters()) + _bytes(model.buffers()), 0
    if quantize is not None:
        base -= quantise.saved_bytes(model, quantize)
        dense = max(m.weight.numel() for m in quantise.quantisable(model, quantize)) * dtype.itemsize  # type: ignore[operator, union-attr]
    try:
        adapter = None if method is None else attach(model, method)
        trained = list((model if adapter is None else adapter).parameters())
        again = options.activation_checkpointing
        found = whole = step(model, adapter, shape, dtype, device)
        if again != "none":
            found = step(model, adapter, shape, dtype, device, again)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, Unsuitable) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeltatuneError(f"no memory estimate for {type(method).__name__}: {why}") from error
    own = 0 if adapter is None else _bytes(iter(adapter.state_dict().values()))
    states = optimizer.state_bytes({id(p): p for p in trained if p.requires_grad}.values(), options)
    parts = {n: found[n] + (dense if n == "backward" else 0) for n in ("gradients", "activations", "loss", "backward")}
    lost = int(SCATTERED * whole["activations"]) if device.type == "cpu" else 0
    return Estimate(base=base, adapter=own, optimizer=states, allocator=lost, process=process, **parts)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def warm(dtype: torch.dtype = torch.float32) -> None:
    """Loads what a first training step makes the process load: kernels, the optimizer, the compiler behind it."""
    layer = nn.Linear(8, 8).to(dtype)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(2, 8, dtype=dtype)).sum().backward()
    optimizer.step()


def held() -> int:
    """Bytes of memory that this process holds now: resident ones."""
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes held since `reset_peak`: of the accelerator's memory, or resident ones."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Begin to measure: give back what was freed, and forget the peak so far, as of the conversion of weights."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def kept_freed() -> Iterator[None]:
    """Inside, memory that this process frees stays its own, and is not to be had from the system at every step anew.

    Of glibc's malloc alone, which gives back large tensors as they are freed, so that each page of the next ones is
    faulted in and cleared again. Afterwards it does as is usual, and what was kept is given back."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, trim, mmap = ctypes.CDLL(None), -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(mmap, 1 << 30)
    libc.mallopt(trim, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(mmap, 32 << 20)  # where its own rule, which this has ended, gets to
        libc.mallopt(trim, 64 << 20)
        libc.malloc_trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def available(device: torch.device) -> int:
    """Bytes of memory that the machine has, for a CPU the process's limit if that is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return physical if text == "max" else min(physical, int(text))
