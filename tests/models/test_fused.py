"""Which modules run a kernel, and that a model trains as it did."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import deltatune as dt
from deltatune.models.fused import fused

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
         "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip


def made(kind, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **settings))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return model


def changed(model):
    return sum(type(m).__name__ == type(m).__mro__[1].__name__ for m in model.modules())  # a class for a class


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("llama", 5 + 2), ("mistral", 5 + 2), ("qwen2", 5 + 2), ("qwen3", 5 + 4 + 2), ("gemma", 0), ("gemma2", 0)],
)
def test_models_compute_and_train_as_before(kind, modules):
    model = made(kind)
    ids = torch.arange(1, 13).view(2, 6)

    def run():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    want = run()
    with fused(model):
        assert changed(model) == modules
        got = run()
    assert changed(model) == 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_module_that_carries_an_adapter_keeps_its_forward():
    model = made("llama")
    dt.attach(model, dt.Tune(targets=dt.Part("norm")))
    with fused(model):
        assert changed(model) == 2  # the gated MLPs, whose projections carry nothing
    model = made("llama")
    dt.attach(model, dt.LoRA())
    with fused(model):
        assert changed(model) == 5 + 2  # its projections may carry one


def test_a_hook_keeps_a_module_as_it_is():
    model = made("llama")
    model.model.norm.register_forward_hook(lambda *args: None)
    with fused(model):
        assert changed(model) == 4 + 2


def test_likeness_of_names_is_not_enough():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + 1

    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))

    model = nn.ModuleList([Shifted(), Gelu()])
    with fused(model):
        assert changed(model) == 0


def test_random_numbers_are_left_alone():
    model = made("llama")
    before = torch.get_rng_state()
    with fused(model):
        pass
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_inside_restores():
    model = made("llama")
    with pytest.raises(ValueError), fused(model):
        raise ValueError
    assert changed(model) == 0
