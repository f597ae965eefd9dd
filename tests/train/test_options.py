from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from deltatune.core.errors import DeltatuneError
from deltatune.data import Batches, Example
from deltatune.train.options import TrainOptions, has_bf16


def _batches(rows: int = 20, length: int = 8, **sizes: int) -> Batches:
    return Batches([Example([3] * length, [-100] + [3] * (length - 1), str(i)) for i in range(rows)], **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrate": 1e-3}, "no option 'lrate'; did you mean 'lr'"),
        ({"lr": 0}, "train.lr: input should be greater than 0, got 0"),
        ({"lr": "1e-4"}, "train.lr: input should be a valid number"),
        ({"epochs": True}, "train.epochs: input should be a valid integer"),
        ({"schedule": "linaer"}, "train.schedule: input should be 'linear', 'cosine' or 'constant'"),
        ({"epochs": 1, "max_steps": 1}, "epochs and max_steps"),
        ({"tokens_per_step": 9, "batch_size": 1}, "tokens_per_step and batch_size"),
        ({"tokens_per_step": 9, "tokens_per_batch": 10}, "tokens_per_batch (10) is more than tokens_per_step (9)"),
        ({"warmup": 1.0}, "a fraction below 1, got 1.0"),
        ({"warmup": -1}, "a fraction below 1, got -1"),
        ({"label_smoothing": 1.0}, "train.label_smoothing: input should be less than 1, got 1.0"),
        ({"label_smoothing": -0.1}, "train.label_smoothing: input should be greater than or equal to 0, got -0.1"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(DeltatuneError) as e:
        TrainOptions(**given)
    assert message in str(e.value)


@pytest.mark.parametrize("given", [{"eval_every": 3}, {"early_stop": 2}, {"keep": "best"}])
def test_evaluation_options_without_evaluation_are_refused(given: dict[str, int]) -> None:
    options = TrainOptions(**given)
    options.check(evaluates=True, output=Path("x"))
    with pytest.raises(DeltatuneError, match=next(iter(given))):
        options.check(evaluates=False, output=Path("x"))


@pytest.mark.parametrize("given", [{"save_every": 3}, {"tensorboard": True}, {"keep": "best"}])
def test_options_of_files_without_a_folder_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(DeltatuneError, match=next(iter(given))):
        TrainOptions(**given).check(evaluates=True, output=None)


THEIRS = [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]


def _reference(make: object, warmup: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = make(optimizer, warmup, steps)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("name", "make"), THEIRS)
def test_without_warmup_schedules_are_those_of_transformers(name: str, make: object) -> None:
    options = TrainOptions(schedule=name, warmup=0)
    assert [options.factor(i, 7) for i in range(1, 8)] == pytest.approx(_reference(make, 0, 7))


@pytest.mark.parametrize(("name", "make"), THEIRS)
def test_with_warmup_they_skip_only_the_step_at_rate_zero(name: str, make: object) -> None:
    options = TrainOptions(schedule=name, warmup=4)
    assert [options.factor(i, 11) for i in range(1, 12)] == pytest.approx(_reference(make, 4, 12)[1:])


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(1, 300),
       st.one_of(st.integers(0, 300), st.floats(0, 0.99)))  # fmt: skip
def test_the_rate_rises_to_its_peak_and_never_reaches_zero(name: str, steps: int, warmup: float) -> None:
    options = TrainOptions(schedule=name, warmup=warmup)
    factors = [options.factor(i, steps) for i in range(1, steps + 1)]
    peak = max(1, warmup if isinstance(warmup, int) else math.ceil(warmup * steps))
    assert all(0 < f <= 1 for f in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak - 1 :] == sorted(factors[peak - 1 :], reverse=True)
    assert peak > steps or factors[peak - 1] == 1
    assert name != "constant" or set(factors[peak - 1 :]) <= {1.0}


@given(st.integers(1, 64), st.integers(1, 200), st.integers(1, 60), st.sampled_from([1, 2, 4]))
def test_rows_per_step_stay_exact_under_any_memory_budget(rows: int, budget: int, longest: int, world: int) -> None:
    options = TrainOptions(batch_size=rows * world, tokens_per_batch=budget)
    sizes = options.batching(longest, world)
    batches = _batches(length=longest, **sizes)
    batches.world = world
    assert options.accumulation(batches) * sizes["batch_size"] * world == rows * world
    assert sizes["batch_size"] == 1 or sizes["batch_size"] * longest <= budget


def test_tokens_per_step_are_split_by_the_budget_and_the_processes() -> None:
    options = TrainOptions(tokens_per_step=4096, tokens_per_batch=512)
    assert options.batching(100) == {"tokens_per_batch": 512}
    assert options.accumulation(_batches(tokens_per_batch=512)) == 8
    assert TrainOptions(tokens_per_step=4096).batching(100, world=2) == {"tokens_per_batch": 2048}
    assert TrainOptions(tokens_per_step=64).batching(100) == {"tokens_per_batch": 100}
    assert TrainOptions().accumulation(_batches(tokens_per_batch=1024)) == 8
    with pytest.raises(DeltatuneError, match="8 rows a step cannot be made of batches of 3 rows"):
        TrainOptions(batch_size=8).accumulation(_batches(batch_size=3))
    with pytest.raises(DeltatuneError, match="9 rows cannot be shared by 2"):
        TrainOptions(batch_size=9).batching(10, world=2)


def test_the_last_step_takes_what_is_left() -> None:
    batches = _batches(rows=10, batch_size=1)
    assert TrainOptions(epochs=3, batch_size=4).count(batches) == (8, 30)
    assert TrainOptions(max_steps=5, batch_size=4).count(batches) == (5, 20)


@pytest.mark.parametrize(("flags", "native"), [("sse avx512_bf16", True), ("amx_bf16", True), ("sse avx512f", False)])
def test_auto_takes_bf16_where_the_processor_has_it(flags: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"flags : {flags}\n")
    cpu = torch.device("cpu")
    assert has_bf16(cpu) is native
    assert TrainOptions().dtype(cpu) is (torch.bfloat16 if native else torch.float32)
    assert TrainOptions(precision="bf16").dtype(cpu) is torch.bfloat16
    assert TrainOptions(precision="fp32").dtype(cpu) is torch.float32
    for capability, want in (((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert has_bf16(torch.device("cuda")) is want
