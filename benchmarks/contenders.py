"""One training stack, measured in a process of its own: prints a line of JSON.

    python benchmarks/contenders.py NAME --data alpaca.json [--seconds 25]

Every stack trains the same rows: SmolLM2-135M-Instruct, rows cut at 256 tokens, loss on the response, AdamW. Its first
step is not counted. Tokens are those of the rows, padding not counted, a beginning that rows share counted in each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import deltatune as dt
from deltatune.core import Callback, Events
from deltatune.data import Batches, Example, build, load, packing
from deltatune.data.packing import Batch
from deltatune.models.blocks import blocked
from deltatune.models.default import default_base
from deltatune.storage.layers import LinearKind
from deltatune.train import loss
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions, has_bf16

MAX_LENGTH, ROWS, TOKENS, R, LR = 256, 4, 2048, 8, 1e-4
LORA = dt.LoRA(r=R)
NATIVE = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32


class Clock:
    """Starts after the first step, and stops the run at the first step that ends after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began, self.tokens, self.elapsed, self.steps = seconds, 0.0, 0, 0.0, 0

    def step(self, tokens: int) -> bool:
        """`tokens`: of the step that ends now. Whether to stop."""
        now = time.perf_counter()
        if not self.began:
            self.began = now
            return False
        self.tokens, self.elapsed, self.steps = self.tokens + tokens, now - self.began, self.steps + 1
        return self.elapsed >= self.seconds


def rss(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def rows(path: str, max_length: int = MAX_LENGTH) -> tuple[Any, list[Example]]:
    tokenizer = AutoTokenizer.from_pretrained(default_base())
    made = build(load(path), tokenizer, task="causal", max_length=max_length, too_long="truncate")
    return tokenizer, made.examples[:600]


def base(dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(default_base(), dtype=dtype)
    model.config.use_cache = False
    return model


# ---- the reference: PEFT under Trainer and under TRL


class Stop(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: Clock, tokens: list[int]) -> None:
        self.clock, self.tokens = clock, tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.clock.step(sum(self.tokens))
        self.tokens.clear()


def reference(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def arguments(per_device: int, dtype: torch.dtype, cls: Any = TrainingArguments, **more: Any) -> Any:
    return cls(output_dir="/tmp/reference", per_device_train_batch_size=per_device, max_steps=10_000, learning_rate=LR,
               report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
               bf16=dtype is torch.bfloat16, dataloader_pin_memory=False, **more)  # fmt: skip


def trainer_padded(examples: list[Example], tokenizer: Any, clock: Clock, dtype: torch.dtype, size: int, **more: Any
                   ) -> None:  # fmt: skip
    """The tutorial: rows padded to the longest of the batch."""
    seen: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        made = packing.padded([batch_row["example"] for batch_row in batch], tokenizer.pad_token_id or 0)
        seen.append(made.tokens)
        return {**made.inputs, "labels": made.labels}

    data: Any = [{"example": e, "input_ids": e.input_ids} for e in examples]  # whose lengths the sampler reads
    args = arguments(size, dtype, remove_unused_columns=False, **more)
    Trainer(reference(base(dtype)), args, collate, data, callbacks=[Stop(clock, seen)]).train()


def trainer_packed(examples: list[Example], tokenizer: Any, clock: Clock, dtype: torch.dtype) -> None:
    """Packed by hand: rows of 256 tokens from several documents, the mask made by transformers from the positions."""
    found = Batches(examples, packing=True, max_length=MAX_LENGTH, batch_size=1)
    data: Any = [batch for _, batch in zip(range(len(found)), found, strict=False)]
    seen: list[int] = []

    def collate(batch: list[Batch]) -> dict[str, Any]:
        seen.append(sum(row.tokens for row in batch))
        longest = max(row.labels.shape[1] for row in batch)

        def fill(t: torch.Tensor, value: int) -> torch.Tensor:
            return F.pad(t, (0, longest - t.shape[1]), value=value)

        return {"input_ids": torch.cat([fill(b.inputs["input_ids"], 0) for b in batch]),
                "position_ids": torch.cat([fill(b.inputs["position_ids"], 0) for b in batch]),
                "labels": torch.cat([fill(b.labels, -100) for b in batch])}  # fmt: skip

    trainer = Trainer(reference(base(dtype)), arguments(TOKENS // MAX_LENGTH, dtype, remove_unused_columns=False),
                      collate, data, callbacks=[Stop(clock, seen)])  # fmt: skip
    trainer.train()


def trl_packed(examples: list[Example], tokenizer: Any, clock: Clock, dtype: torch.dtype) -> None:
    """TRL's SFTTrainer, packing by best fit."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    seen: list[int] = []
    rows = [{"input_ids": e.input_ids, "completion_mask": [int(t != -100) for t in e.labels]} for e in examples]
    data = Dataset.from_list(rows)
    args = arguments(TOKENS // MAX_LENGTH, dtype, SFTConfig, packing=True, max_length=MAX_LENGTH,
                     completion_only_loss=True, gradient_checkpointing=False)  # fmt: skip
    trainer = SFTTrainer(reference(base(dtype)), args, train_dataset=data, processing_class=tokenizer,
                         callbacks=[Stop(clock, seen)])  # fmt: skip
    inner = trainer.data_collator

    def collate(batch: Any) -> Any:
        made = inner(batch)
        seen.append(sum(len(row["input_ids"]) for row in batch))
        return made

    trainer.data_collator = collate
    trainer.train()


# ---- deltatune, trick by trick


class Timed(Callback):
    def __init__(self, clock: Clock, tokens: list[int]) -> None:
        object.__setattr__(self, "clock", clock)
        object.__setattr__(self, "tokens", tokens)

    def start(self, run: Any) -> Events:
        outer = self

        class _Steps(Events):
            def on_step_end(self, run: Any) -> None:
                if outer.clock.step(sum(outer.tokens)):  # type: ignore[attr-defined]
                    raise Done
                outer.tokens.clear()  # type: ignore[attr-defined]

        return _Steps()


class Done(Exception):
    pass


@contextmanager
def plain_linears() -> Iterator[None]:
    """The low-rank change of a linear in separate operations."""
    with mock.patch.object(LinearKind, "fused", lambda *args: None):
        yield


def whole(model: Any, batch: Batch, task: str, passes: int = 1) -> loss.Outcome:
    """The loss as a model computes it: logits of every position."""
    wanted = loss.targets(batch, "causal")
    with loss.layout(batch.blocks):
        logits = model(**batch.inputs).logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    return loss.Outcome(total, int((wanted != -100).sum()), torch.zeros(()))


@contextmanager
def whole_logits() -> Iterator[None]:
    with mock.patch("deltatune.train.loop.outcome", whole):
        yield


@contextmanager
def plain_blocks() -> Iterator[None]:
    """Norms and gates operation by operation."""
    with mock.patch("deltatune.train.loop.fused", lambda model: nullcontext()):
        yield


@contextmanager
def nothing_shared() -> Iterator[None]:
    with mock.patch.object(packing, "_shared", lambda examples: 0):
        yield


def ours(examples: list[Example], tokenizer: Any, clock: Clock, *, packed: str = "blocks",
         without: tuple[Callable[[], Any], ...] = (), method: dt.Method | None = LORA, micro: int = TOKENS,
         lr: float = LR, **options: Any) -> dict[str, Any]:  # fmt: skip
    """`method`: None for full fine-tuning. `micro`: tokens of a forward pass; a step is about `TOKENS`."""
    full = method is None
    model = base(torch.float32 if full else NATIVE)
    adapter = None if method is None else dt.attach(model, method)
    if full:
        model.requires_grad_(True)
    how: dict[str, Any] = {"pad": tokenizer.pad_token_id or 0}
    if packed == "none":
        batches = Batches(examples, batch_size=ROWS, **how)
        told = TrainOptions(batch_size=ROWS, epochs=50, lr=lr)
    else:
        batches = Batches(examples, tokens_per_batch=micro, packing=packed != "padded", max_length=MAX_LENGTH,
                          blocked=packed == "blocks", group_by_length=packed == "padded", **how)  # fmt: skip
        told = TrainOptions(tokens_per_step=TOKENS, tokens_per_batch=micro, epochs=50, lr=lr, **options)
    seen: list[int] = []
    computed: list[tuple[int, int, int]] = []
    collate = batches._collate

    def counted(plan: Any) -> Batch:
        made = collate(plan)
        seen.append(made.tokens)
        lengths, begin = (made.blocks.lengths, made.blocks.shared) if made.blocks else (documents(made), 0)
        cells = begin * (begin + 1) // 2 + sum(n * (n + 1) // 2 + n * begin for n in lengths)
        computed.append((begin + sum(lengths), made.trained_tokens, cells))
        return made

    with ExitStack() as stack, mock.patch.object(batches, "_collate", counted):
        for trick in without:
            stack.enter_context(trick())
        stack.enter_context(blocked(model) if packed == "blocks" else nullcontext())
        with suppress(Done):
            fit(model, adapter, batches, options=told, callbacks=[Timed(clock, seen)])
    each = told.accumulation(batches)
    done = computed[each : each * (1 + clock.steps)]
    return {
        "flops": _flops(model, done, full),
        "trained": sum(t for _, t, _ in done),
        "computed": sum(n for n, _, _ in done),
    }


def documents(batch: Batch) -> list[int]:
    """The tokens of each, packed or padded: what a layout without waste would compute."""
    return [n for row in batch.segments for n in row[row >= 0].unique_consecutive(return_counts=True)[1].tolist()]


def _flops(model: Any, batches: list[tuple[int, int, int]], full: bool) -> float:
    """What training on batches of so many (tokens, trained tokens, pairs that attend) needs: 2 products of a frozen
    linear layer, 3 of one that trains, of the head for trained positions alone; of attention 2 forward and 4 backward,
    over lower triangles; 6 of a pair of factors."""
    c = model.config
    kv = c.num_key_value_heads * c.head_dim
    sizes = [(c.hidden_size, c.hidden_size), (c.hidden_size, kv), (c.hidden_size, kv), (c.hidden_size, c.hidden_size),
             *[(c.hidden_size, c.intermediate_size)] * 3]  # fmt: skip
    weights = c.num_hidden_layers * sum(i * o for i, o in sizes)
    factors = 0 if full else c.num_hidden_layers * sum(R * (i + o) for i, o in sizes)
    head, heads = c.hidden_size * c.vocab_size, c.num_hidden_layers * c.num_attention_heads * c.head_dim
    return sum(2 * n * ((3 if full else 2) * weights + 3 * factors) + 2 * t * (3 if full else 2) * head
               + 2 * 6 * heads * cells for n, t, cells in batches)  # fmt: skip


def gemm() -> float:
    """GFLOP/s of this machine now, at the model's shapes, forward and backward, in the precision of training."""
    shapes, flops, seconds = ((576, 1536), (1536, 576), (576, 576), (576, 192)), 0.0, 0.0
    for i, o in shapes:
        x, w, g = (torch.randn(n, m, dtype=NATIVE) for n, m in ((TOKENS, i), (o, i), (TOKENS, o)))
        for _ in range(2):
            x @ w.T, g @ w
        for _ in range(8):
            began = time.perf_counter()
            x @ w.T, g @ w
            seconds += time.perf_counter() - began
            flops += 4 * TOKENS * i * o
    return flops / seconds / 1e9


STACKS: dict[str, Callable[..., Any]] = {
    "tutorial": lambda *a: trainer_padded(*a, torch.float32, ROWS),
    "reference, bf16": lambda *a: trainer_padded(*a, torch.bfloat16, ROWS),
    "reference, larger batch by length": lambda *a: trainer_padded(
        *a, NATIVE, 12, train_sampling_strategy="group_by_length"),
    "reference, packed": lambda *a: trainer_packed(*a, NATIVE),
    "reference, TRL packed": lambda *a: trl_packed(*a, NATIVE),
    "plain": lambda *a: ours(*a, packed="none", without=(plain_linears, whole_logits, plain_blocks)),
    "+ packed rows": lambda *a: ours(*a, packed="rows", without=(plain_linears, whole_logits, plain_blocks)),
    "+ chunked loss": lambda *a: ours(*a, packed="rows", without=(plain_linears, plain_blocks)),
    "+ one node a linear": lambda *a: ours(*a, packed="rows", without=(plain_blocks,)),
    "+ one node a norm and a gate": lambda *a: ours(*a, packed="rows"),
    "+ attention by documents": lambda *a: ours(*a, without=(nothing_shared,)),
    "+ shared beginnings": lambda *a: ours(*a),
    "in passes of 768 tokens": lambda *a: ours(*a, micro=768),
    "recomputing blocks": lambda *a: ours(*a, activation_checkpointing="blocks"),
    "recomputing all but products": lambda *a: ours(*a, activation_checkpointing="products"),
    "compiled blocks": lambda *a: ours(*a, speed="compile"),
    "full fine-tuning": lambda *a: ours(*a, method=None),
}  # fmt: skip
IN_FP32 = ("tutorial", "full fine-tuning")
MADE: dict[str, Callable[[], dt.Method]] = {
    "one norm alone": lambda: dt.Tune(targets=r".*layers\.0\.input_layernorm"),  # the base's own passes
    "LoRA": lambda: dt.LoRA(r=R),
    "DoRA": lambda: dt.DoRA(inner=dt.LoRA(r=R)),
    "IA3": dt.IA3,
    "gains of norms": lambda: dt.Tune(targets=dt.Part("norm")),  # BitFit has no bias to train here
    "Houlsby": lambda: dt.Houlsby(size=R),
    "PrefixTuning": lambda: dt.PrefixTuning(length=16),
    "OFTv2": dt.OFTv2,
    "VeRA": dt.VeRA,
    "LoKr": dt.LoKr,
    "LadderSideTuning": dt.LadderSideTuning,
}
METHODS: dict[str, Callable[..., Any]] = {
    f"method {name}": partial(lambda make, *a: ours(*a, packed="padded", method=make(), lr=make().lr), make)
    for name, make in MADE.items()
}
STACKS |= METHODS


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("name", choices=STACKS)
    args.add_argument("--data", required=True)
    args.add_argument("--seconds", type=float, default=25)
    given = args.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    tokenizer, examples = rows(given.data)
    bf16 = given.name == "reference, bf16"
    dtype = torch.float32 if given.name in IN_FP32 else torch.bfloat16 if bf16 else NATIVE
    weights = sum(p.numel() * p.element_size() for p in base(dtype).parameters())
    before = rss()
    ceiling = gemm()
    clock = Clock(given.seconds)
    more = STACKS[given.name](examples, tokenizer, clock) or {}
    ceiling = (ceiling + gemm()) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flops = more.pop("flops", None)
    share = {} if flops is None else {"share": flops / clock.elapsed / 1e9 / ceiling}
    print(json.dumps({"name": given.name, "rate": clock.tokens / clock.elapsed, "steps": clock.steps,
                      "peak": peak - before - weights, "gemm": ceiling, **share, **more}))  # fmt: skip


if __name__ == "__main__":
    main()
