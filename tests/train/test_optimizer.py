"""AdamW and its 8-bit kind: the same maths, a quarter of the memory, and a state that a checkpoint holds."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from runs import whole_run
from torch import nn

from deltatune.core import DeltatuneError
from deltatune.train import checkpoint
from deltatune.train.optimizer import make, state_bytes
from deltatune.train.options import TrainOptions

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
EIGHT = TrainOptions(optimizer="adamw_8bit", lr=1e-2, weight_decay=0.1)


def _pair() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(96, 64)), nn.Parameter(torch.randn(40))]


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": [p], "lr": lr, "weight_decay": 0.1} for p, lr in zip(parameters, (1e-2, 2e-2), strict=True)]


def _steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = p.detach() + 0.3 * torch.randn(p.shape, generator=g)
        optimizer.step()


def test_it_is_adamw_up_to_the_rounding_of_its_moments() -> None:
    ends = []
    for options in (TrainOptions(lr=1e-2, weight_decay=0.1), EIGHT):
        parameters = _pair()
        _steps(make(_groups(parameters), options, CPU), parameters, range(60))
        ends.append(parameters)
    start, (wide, eight) = _pair(), ends
    torch.testing.assert_close(eight[1], wide[1], atol=1e-6, rtol=1e-5)  # too small to be rounded
    assert not torch.equal(eight[0], wide[0])
    assert (eight[0] - wide[0]).norm() < 0.03 * (wide[0] - start[0]).norm()


def test_the_bytes_of_its_state_are_those_that_plan_counts() -> None:
    parameters = _pair()
    for options in (TrainOptions(), EIGHT, TrainOptions(optimizer="paged_adamw_8bit")):
        optimizer = make(_groups(parameters), options, CPU)
        _steps(optimizer, parameters, range(1))
        held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for k, t in state.items()
                   if isinstance(t, torch.Tensor) and not k.startswith("qmap") and k != "step")  # fmt: skip
        assert state_bytes(parameters, options) == held


def test_a_checkpoint_holds_its_state_bit_for_bit() -> None:
    one, two = _pair(), _pair()
    first = make(_groups(one), EIGHT, CPU)
    _steps(first, one, range(5))
    tensors, rest = checkpoint.optimizer_state(first)
    rest = json.loads(json.dumps(rest))
    second = make(_groups(two), EIGHT, CPU)
    for p, q in zip(two, one, strict=True):
        p.data.copy_(q)
    checkpoint.restore_optimizer(second, {k: t.clone() for k, t in tensors.items()}, rest)
    _steps(first, one, range(5, 9))
    _steps(second, two, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_a_run_with_it() -> None:
    _, _, wide = whole_run(None, steps=6)
    _, _, eight = whole_run(None, steps=6, optimizer="adamw_8bit")
    got, want = ([r["loss"] for r in result.history if "loss" in r] for result in (eight, wide))
    assert got == pytest.approx(want, rel=1e-4)  # every factor of the tiny model is too small to be rounded


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DeltatuneError, match=r"train.optimizer: adamw_8bit needs bitsandbytes.*deltatune\[quant\].*adamw"
    ):
        make(_groups(_pair()), EIGHT, CPU)
