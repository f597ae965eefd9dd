"""LoRA+: which parameters learn faster, and by how much, and PEFT's groups and steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
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


LINEAR = ("q_proj", "down_proj")
reference_optimizer = partial(create_loraplus_optimizer, optimizer_cls=torch.optim.AdamW, loraplus_lr_ratio=8)


def pair(targets: tuple[str, ...], dora: bool = False) -> tuple[nn.Module, dt.Adapter, nn.Module, dict[str, Any]]:
    """Our model and adapter, and PEFT's model, with our values; its parameters by the names that ours have."""
    lora = dt.LoRA(r=2, alpha=2, targets=targets)
    model, adapter, _ = prepared(dt.DoRA(inner=lora, targets=targets) if dora else lora, None)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, use_dora=dora, target_modules=list(targets))
    theirs, named = peft.get_peft_model(tiny("llama"), config), {}
    for path, module, _, _ in adapter.sites():
        other = theirs.get_submodule(f"base_model.model.{path}")
        if isinstance(module, nn.Embedding):  # W (tokens, dim) is B A here, and (B A)^T there
            found = {"b": other.lora_embedding_A["default"], "a": other.lora_embedding_B["default"]}
        else:
            found = {"a": other.lora_A["default"].weight, "b": other.lora_B["default"].weight}
        if dora:
            found = {f"inner.{n}": p for n, p in found.items()} | {"m": other.lora_magnitude_vector["default"].weight}
        named |= {f"{path}.0.{n}": p for n, p in found.items()}
    return model, adapter, theirs, named


def rates(groups: Groups, named: dict[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each parameter."""
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: found[id(p)] for name, p in named.items()}


def in_groups(model: nn.Module, adapter: dt.Adapter, **options: float) -> Groups:
    groups: Groups = [{"params": list(adapter.parameters()), **options}]
    return dt.LoRAPlus(ratio=8.0).start(Run(model, adapter, 1)).param_groups(groups)


def test_peft_s_groups() -> None:
    """The factors of linear layers have PEFT's rates and decay. Two facts differ. PEFT gives both factors of an
    embedding one rate of their own, 1e-6 unless told, at which they hardly move; here its B is fast as every B is.
    PEFT's decay is 0 unless told, whatever `weight_decay` says; here the run's decay is kept."""
    model, adapter, theirs, named = pair((*LINEAR, "embed_tokens"))
    options = {"lr": 0.1, "weight_decay": 0.2}
    ours = rates(in_groups(model, adapter, **options), dict(adapter.named_parameters()))
    other = reference_optimizer(theirs, lr=0.1, loraplus_weight_decay=0.2)
    reference = rates(other.param_groups, named)
    assert ours.keys() == reference.keys()
    embedding = {n for n in ours if "embed" in n}
    assert {n: ours[n] for n in ours if n not in embedding} == {n: reference[n] for n in ours if n not in embedding}
    assert {n[-1]: ours[n] for n in embedding} == {"a": (0.1, 0.2), "b": (0.8, 0.2)}
    assert {reference[n] for n in embedding} == {(1e-6, 0.2)}
    other = reference_optimizer(theirs, **options)
    assert {decay for _, decay in rates(other.param_groups, named).values()} == {0.0}


def test_peft_s_groups_of_dora() -> None:
    """PEFT has all parameters of one dimension learn fast, DoRA's magnitude too; it is no B, and is slow here."""
    model, adapter, theirs, named = pair(LINEAR, dora=True)
    ours = rates(in_groups(model, adapter, lr=0.1, weight_decay=0.2), dict(adapter.named_parameters()))
    other = reference_optimizer(theirs, lr=0.1, loraplus_weight_decay=0.2)
    reference = rates(other.param_groups, named)
    assert ours.keys() == reference.keys()
    assert {n for n in ours if ours[n] != reference[n]} == {n for n in ours if n.endswith(".m")}
    assert {(ours[n], reference[n]) for n in ours if n.endswith(".m")} == {((0.1, 0.2), (0.8, 0.2))}


def test_peft_step_by_step() -> None:
    model, adapter, theirs, named = pair(LINEAR)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            named[name].copy_(p)
    optimizer = torch.optim.AdamW(in_groups(model, adapter, lr=1e-3, weight_decay=0.2))
    other = reference_optimizer(theirs, lr=1e-3, loraplus_weight_decay=0.2)
    for seed in range(3):
        batch = inputs(model, seed=seed)
        for net, step in ((model, optimizer), (theirs, other)):
            net(**batch, labels=batch["input_ids"]).loss.backward()
            step.step()
            step.zero_grad()
        for name, p in adapter.named_parameters():
            torch.testing.assert_close(p, named[name], rtol=1e-4, atol=1e-5)
    assert min(p.abs().max() for n, p in adapter.named_parameters() if n.endswith("b")) > 1e-2


def test_what_has_no_up_projection_is_refused() -> None:
    model = tiny("llama")
    adapter = dt.attach(model, dt.IA3())
    with pytest.raises(dt.DeltatuneError, match='role "up"'):
        dt.LoRAPlus().start(Run(model, adapter, 1))
    with pytest.raises(dt.DeltatuneError, match="ratio must be positive, got 0"):
        dt.LoRAPlus(ratio=0)
