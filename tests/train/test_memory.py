from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import deltatune as dt
from deltatune.train.memory import Estimate, Shape, estimate
from deltatune.train.options import TrainOptions

CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
CPU = torch.device("cpu")

# One real run in a process of its own, where nothing else has stretched the heap.
REAL = """
import random, sys, torch
from test_memory import CONFIG, CPU
import deltatune as dt
from transformers import AutoModelForCausalLM
from deltatune.data import Batches, Example
from deltatune.train import memory
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions
from deltatune.train.batching import largest

rows, length, trained, checkpointing = map(int, sys.argv[1:])
memory.warm()
process = memory.held()
options = TrainOptions(max_steps=3, tokens_per_step=rows * length, precision="fp32",
                       activation_checkpointing=bool(checkpointing))
draw = random.Random(0)
ids = [[draw.randrange(4096) for _ in range(length)] for _ in range(3 * rows)]
examples = [Example(i, [-100] * (length - trained) + i[length - trained:]) for i in ids]
batches = Batches(examples, tokens_per_batch=rows * length)
with torch.device("meta"):
    blank = AutoModelForCausalLM.from_config(CONFIG)
found = memory.estimate(blank, dt.LoRA(r=8), largest(batches), options,
                        dtype=torch.float32, device=CPU, process=process)
model = AutoModelForCausalLM.from_config(CONFIG)
adapter = dt.attach(model, dt.LoRA(r=8))
memory.reset_peak(CPU)
fit(model, adapter, batches, options=options)
print(found.total, memory.peak(CPU))
"""


@pytest.mark.parametrize(
    ("rows", "length", "trained", "checkpointing"), [(4, 256, 100, 0), (16, 64, 64, 0), (8, 256, 40, 1)]
)
def test_the_estimate_is_within_15_percent_of_the_peak(
    rows: int, length: int, trained: int, checkpointing: int
) -> None:
    given = [str(n) for n in (rows, length, trained, checkpointing)]
    code = f"import sys; sys.path[:0] = {sys.path!r}\nsys.path.insert(0, {__file__.rpartition('/')[0]!r})\n{REAL}"
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    guessed, measured = map(int, done.stdout.split()[-2:])
    assert abs(guessed / measured - 1) < 0.15, f"estimated {guessed / 2**20:.0f} MiB, took {measured / 2**20:.0f} MiB"


def _estimate(
    rows: int = 2, length: int = 64, trained: int = 32, dtype: torch.dtype = torch.float32, **options: object
) -> Estimate:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    return estimate(model, dt.LoRA(r=8), Shape(rows, length, trained), TrainOptions(**options), dtype=dtype, device=CPU)


def test_parts_that_can_be_counted() -> None:
    found = _estimate()
    per_block = 8 * (256 + 256 + 2 * (256 + 128) + 256 + 256 + 2 * (256 + 704) + 704 + 256)
    assert found.adapter == 4 * 6 * per_block and found.optimizer == 2 * found.adapter
    weights = 2 * 4096 * 256 + 256 + 6 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 704 + 2 * 256)
    assert 0 <= found.base - 4 * weights < 4096  # and the frequencies of the rotary embedding
    assert found.total == sum(v for k, v in found.to_dict().items() if k != "total")
    assert found.loss == 32 * (4 * 4096 + 8) + 4  # of trained positions alone: logits, targets, and their loss


def test_what_blocks_keep_grows_with_tokens_and_shrinks_by_checkpointing() -> None:
    one, two, four = (_estimate(rows=n).activations for n in (1, 2, 4))
    assert four - two == 2 * (two - one) and one < 1.1 * (two - one)
    four = _estimate(rows=4)
    assert _estimate(rows=4, activation_checkpointing=True).activations < four.activations / 3
    assert _estimate(rows=4, dtype=torch.bfloat16).activations < 0.75 * four.activations


def test_attention_keeps_no_matrix() -> None:
    short, long = _estimate(rows=8, length=64), _estimate(rows=1, length=512)
    assert long.activations < 1.1 * short.activations + 5 * 512**2
