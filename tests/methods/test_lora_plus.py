"""LoRA+: which parameters learn faster, and by how much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core import Groups, Method, Run
from deltatune.models.tiny import inputs, tiny


def prepared(method: Method, ratio: float | None, **options: float) -> tuple[nn.Module, dt.Adapter, Groups]:
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = dt.attach(model, method)
    groups: Groups = [{"params": list(adapter.parameters()), "lr": 0.1, **options}]
    if ratio is not None:
        groups = dt.LoRAPlus(ratio=ratio).start(Run(model, adapter, 1)).param_groups(groups)
    return model, adapter, groups


@pytest.mark.parametrize(
    "method", [dt.LoRA(r=2), dt.DoRA(inner=dt.LoRA(r=2)), dt.AdaLoRA(target_r=1, init_r=2), dt.Houlsby(size=2)]
)
def test_groups_are_the_trained_set_and_only_up_is_fast(method: Method) -> None:
    _, adapter, groups = prepared(method, 8.0, weight_decay=0.2)
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) and {*map(id, grouped)} == {*map(id, adapter.parameters())}
    fast = {id(p) for g in groups if g["lr"] == pytest.approx(0.8) for p in g["params"]}
    assert fast == {id(p) for role, p in adapter.roles() if role == "up"}
    assert all(g["lr"] == 0.1 or g["lr"] == pytest.approx(0.8) for g in groups)
    assert all(g["weight_decay"] == 0.2 for g in groups)


def trained(ratio: float | None, optimizer: type[torch.optim.Optimizer], steps: int) -> dict[str, torch.Tensor]:
    model, adapter, groups = prepared(dt.LoRA(r=2), ratio)
    batch = inputs(model)
    step = optimizer(groups)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        step.step()
        step.zero_grad()
    return {n: p.detach() for n, p in adapter.named_parameters()}


def test_ratio_one_is_lora_bitwise() -> None:
    plain, plus = trained(None, torch.optim.AdamW, 3), trained(1.0, torch.optim.AdamW, 3)
    assert all(torch.equal(plain[n], plus[n]) for n in plain)


def test_one_sgd_step_moves_b_ratio_times_as_far_and_a_the_same() -> None:
    start = trained(None, torch.optim.SGD, 0)
    one, eight = (trained(ratio, torch.optim.SGD, 1) for ratio in (1.0, 8.0))
    for n in start:
        scale = 8 if n.endswith(".b") else 1
        torch.testing.assert_close(eight[n] - start[n], scale * (one[n] - start[n]), atol=1e-7, rtol=1e-4)
    assert any((one[n] != start[n]).any() for n in start)


def test_schedules_keep_the_ratio() -> None:
    _, _, groups = prepared(dt.LoRA(r=2), 16.0)
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(4):
        optimizer.step()
        schedule.step()
        slow, fast = (g["lr"] for g in optimizer.param_groups)
        assert fast / slow == pytest.approx(16)


def test_what_has_no_up_projection_is_refused() -> None:
    model = tiny("llama")
    adapter = dt.attach(model, dt.IA3())
    with pytest.raises(dt.DeltatuneError, match='role "up"'):
        dt.LoRAPlus().start(Run(model, adapter, 1))
    with pytest.raises(dt.DeltatuneError, match="ratio must be positive, got 0"):
        dt.LoRAPlus(ratio=0)
