from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from runs import whole_run
from transformers import AutoModelForCausalLM, LlamaConfig

import deltatune as dt
from deltatune.kernels import cross_entropy
from deltatune.kernels.attention import Blocks
from deltatune.train import loop, memory
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

rows, length, trained = map(int, sys.argv[1:4])
recompute, packing = sys.argv[4:]
memory.warm()
process = memory.held()
options = TrainOptions(max_steps=3, tokens_per_step=rows * length, precision="fp32",
                       activation_checkpointing=recompute)
draw = random.Random(0)
ids = [[draw.randrange(4096) for _ in range(length - i % 2)] for i in range(3 * rows)]  # some are padded
examples = [Example(i, [-100] * max(0, len(i) - trained) + i[max(0, len(i) - trained):]) for i in ids]
blocks = packing == "blocks"
batches = Batches(examples, tokens_per_batch=rows * length, packing=blocks, blocked=blocks)
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
    ("rows", "length", "trained", "recompute", "packing"),
    [(4, 256, 100, "none", "rows"), (16, 64, 64, "none", "blocks"), (8, 256, 40, "blocks", "rows"),
     (8, 256, 250, "products", "blocks")],
)  # fmt: skip
def test_the_estimate_is_within_15_percent_of_the_peak(
    rows: int, length: int, trained: int, recompute: str, packing: str
) -> None:
    given = [*map(str, (rows, length, trained)), recompute, packing]
    code = f"import sys; sys.path[:0] = {sys.path!r}\nsys.path.insert(0, {__file__.rpartition('/')[0]!r})\n{REAL}"
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    guessed, measured = map(int, done.stdout.split()[-2:])
    assert abs(guessed / measured - 1) < 0.15, f"estimated {guessed / 2**20:.0f} MiB, took {measured / 2**20:.0f} MiB"


def _estimate(
    rows: int = 2, length: int = 64, trained: int = 32, blocks: Blocks | None = None,
    dtype: torch.dtype = torch.float32, method: dt.Method | None = None, device: torch.device = CPU, **options: object
) -> Estimate:  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    shape = Shape(rows, length, trained, blocks=blocks)
    return estimate(model, method or dt.LoRA(r=8), shape, TrainOptions(**options), dtype=dtype, device=device)


def test_parts_that_can_be_counted() -> None:
    found = _estimate()
    per_block = 8 * (256 + 256 + 2 * (256 + 128) + 256 + 256 + 2 * (256 + 704) + 704 + 256)
    assert found.adapter == 4 * 6 * per_block and found.optimizer == 2 * found.adapter
    weights = 2 * 4096 * 256 + 256 + 6 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 704 + 2 * 256)
    assert 0 <= found.base - 4 * weights < 4096  # and the frequencies of the rotary embedding
    assert found.total == sum(v for k, v in found.to_dict().items() if k != "total")


def test_what_blocks_keep_grows_with_tokens_and_shrinks_by_checkpointing() -> None:
    one, two, four = (_estimate(rows=n, trained=64 * n).activations for n in (1, 2, 4))  # peaks are at the loss
    assert four - two == 2 * (two - one) and one < 1.1 * (two - one)
    whole = _estimate(rows=4)
    blocks, products = (_estimate(rows=4, activation_checkpointing=w).activations for w in ("blocks", "products"))
    assert blocks < whole.activations / 3 and 2 * blocks < products < 0.7 * whole.activations
    assert _estimate(rows=4, dtype=torch.bfloat16).activations < 0.75 * whole.activations


def test_attention_keeps_no_matrix() -> None:
    short, long = _estimate(rows=8, length=64), _estimate(rows=1, length=512)
    assert long.activations < 1.1 * short.activations + 5 * 512**2


def test_the_loss_holds_a_chunk_of_logits_as_the_kernel_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the chunk: of each trained token its hidden states' gradient, and a few numbers."""
    wide = LlamaConfig(**CONFIG.to_dict() | {"vocab_size": 32768, "num_hidden_layers": 1})
    monkeypatch.setitem(cross_entropy.CHUNK, "cuda", 2**25)

    def found(n: int, device: str) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(wide)
        return estimate(model, dt.LoRA(r=8), Shape(8, 256, n), TrainOptions(), dtype=torch.float32,
                        device=torch.device(device)).loss  # fmt: skip

    for n, device, rows in ((300, "cpu", 300), (1000, "cpu", 500), (2000, "cpu", 500), (1000, "cuda", 250)):
        logits = 4 * 32768 * rows
        assert logits <= found(n, device) <= logits + n * (3 * 4 * 256 + 64) + 8 * 4 * 32768


def test_documents_in_one_row_cost_what_they_cost_apart() -> None:
    apart = _estimate(rows=8, length=64, trained=256)
    blocks = _estimate(rows=1, length=512, trained=256, blocks=Blocks(0, (64,) * 8))
    assert blocks.activations == pytest.approx(apart.activations, rel=0.1) and blocks.total < 1.05 * apart.total


@pytest.mark.parametrize("method", [dt.PromptTuning(), dt.PrefixTuning(), dt.Mixture(), dt.DoRA(), dt.Houlsby()])
def test_methods_have_a_figure(method: dt.Method) -> None:
    found = _estimate(rows=4, trained=100, method=method)
    assert found.adapter > 0 and found.optimizer == 2 * found.adapter and found.activations > 2**24


KEPT = """
import resource, torch
from deltatune.train import memory
def faults():  # pages that tensors of 40 MB, made and dropped, are faulted in for
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
with memory.kept_freed():
    faults()  # the first few make room
    kept, resident = faults(), memory.held()
print(kept, usual, resident - memory.held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc alone")
def test_freed_memory_is_kept_and_then_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    kept, usual, given_back = map(int, found.stdout.split())
    assert kept < 100 < 190 < usual and given_back > 30_000_000  # huge pages are 20 to a tensor, others 10,000


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    with memory.kept_freed():
        pass


def test_a_run_on_a_cpu_keeps_what_it_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @contextmanager
    def watched():  # type: ignore[no-untyped-def]
        seen.append("in")
        yield
        seen.append("out")

    monkeypatch.setattr(loop, "kept_freed", watched)
    whole_run(None, steps=1, report=seen.append)
    assert [s for s in seen if isinstance(s, str)] == ["in", "out"] and seen[0] == "in" and seen[-1] == "out"
