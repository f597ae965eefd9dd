"""EVA, CorDA and LoRA-GA as PEFT starts them."""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.models.tiny import inputs, tiny

TARGETS = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture
def theirs(monkeypatch: Any) -> None:
    module = ModuleType("attr")  # which PEFT's CorDA takes `dataclass` from, and does not require
    module.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attr", module)


def parity(**config: Any) -> tuple[Any, Any, list[Any]]:
    torch.manual_seed(0)
    net = tiny("llama")
    batches = [inputs(net, 4, 24, seed=i) for i in range(4)]
    return net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **config), batches


def layers_of(model: Any) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("method, init", [("ipm", dt.CorDA()), ("kpm", dt.CorDAPreserved())])
def test_peft_starts_corda_from_the_same_product(theirs: None, method: str, init: Any) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    net, config, _ = parity(init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
    batch = inputs(net, 1, 120)  # one row, because each is weighted by its own maximum there
    adapter = dt.attach(net, dt.LoRA(r=4, alpha=8, init=init, targets=tuple(TARGETS)))
    dt.initialise(adapter, lambda n: iter([net(**batch).logits.sum()]))
    other = tiny("llama")
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k})
    preprocess_corda(other, config, run_model=lambda: other(**batch))
    found = layers_of(peft.get_peft_model(other, config))
    for path, _, unit, _ in adapter.sites():
        a, b = (found[path].__getattr__(n)["default"].weight for n in ("lora_A", "lora_B"))
        torch.testing.assert_close(unit.b @ unit.a, b @ a, atol=2e-5, rtol=1e-3)


class Odd(nn.Module):
    """Without biases, and run on x and -x, every layer's inputs have a mean of zero, which PEFT takes off and the
    paper does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(i, o, bias=False) for i, o in ((12, 16), (16, 10), (10, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def test_peft_starts_eva_from_the_same_directions_and_ranks() -> None:
    torch.manual_seed(0)
    net = Odd()
    half = torch.randn(200, 12) * torch.tensor([3.0, 2.6, 2.2, 1.8, *[0.2] * 8])
    x, names = torch.cat([half, -half]), ["one", "two", "three"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights="eva",
                             eva_config=peft.EvaConfig(rho=2.0, tau=0.999))  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(net), config)
    peft.initialize_lora_eva_weights(
        model, [x, x], forward_fn=lambda m, batch: m(batch), prepare_model_inputs_fn=None, show_progress_bar=False,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0])  # fmt: skip
    adapter = dt.attach(net, dt.LoRA(r=3, alpha=6, init=dt.EVA(tau=0.999), targets=tuple(names)))
    dt.initialise(adapter, lambda n: (net(x).sum() for _ in range(2)))
    found, ranks = layers_of(model), []
    for path, _, unit, _ in adapter.sites():
        a = found[path].lora_A["default"].weight
        assert a.shape == unit.a.shape and found[path].scaling["default"] == unit.s
        torch.testing.assert_close(F.cosine_similarity(a, unit.a).abs(), torch.ones(len(a)), atol=5e-3, rtol=0)
        ranks.append(len(a))
    assert sum(ranks) == 9 and len(set(ranks)) > 1


def test_peft_starts_lora_ga_from_the_same_factors() -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    net, config, batches = parity(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(stable_gamma=9))

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    other = copy.deepcopy(net)
    adapter = dt.attach(net, dt.LoRA(r=4, alpha=8, init=dt.LoRAGA(gamma=9), targets=tuple(TARGETS)))
    dt.initialise(adapter, lambda n: (loss(net, b) for b in batches))
    preprocess_loraga(other, config, lambda: [loss(other, b).backward() for b in batches])
    found = layers_of(peft.get_peft_model(other, config))
    for path, _, unit, _ in adapter.sites():
        a, b = (found[path].__getattr__(n)["default"].weight for n in ("lora_A", "lora_B"))
        for ours, peers in ((unit.a, a), (unit.b.T, b.T)):
            cosines = F.cosine_similarity(ours, peers, dim=1).abs()
            torch.testing.assert_close(cosines, torch.ones(4), atol=1e-3, rtol=0)  # their lengths are not the paper's
