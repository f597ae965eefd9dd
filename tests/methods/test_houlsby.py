"""Houlsby adapters: where they sit, what they compute, and what is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.methods.houlsby import Bottleneck
from deltatune.models.tiny import inputs, tiny


def randomise(adapter: dt.Adapter, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_one_adapter_after_attention_and_one_after_the_mlp_of_each_block(family: str) -> None:
    model = tiny(family)
    adapter = dt.attach(model, dt.Houlsby(size=3))
    places = [path for path, _, unit, _ in adapter.sites() if isinstance(unit, Bottleneck)]
    blocks = 4 if family == "t5" else 2
    assert len(places) == 2 * blocks
    assert not any("EncDecAttention" in p for p in places)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_parameter_count_of_the_paper(family: str) -> None:
    """L 2 (2 d m + m + d) in the adapters, 4 d L and the norm of the embeddings (BERT) or of the end (GPT-2)."""
    model = tiny(family)
    d, m, blocks = 32, 5, 2
    heads = 2 * d if family == "bert" else 0  # the norm in BERT's language head is one of its norms
    want = blocks * 2 * (2 * d * m + m + d) + 4 * d * blocks + 2 * d + heads
    assert dt.plan(model, dt.Houlsby(size=m)).trained == want


def test_frozen_norms() -> None:
    assert dt.plan(tiny("llama"), dt.Houlsby(size=4, norms=None)).trained == 2 * 2 * (2 * 32 * 4 + 4 + 32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(x))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_equation_on_a_plain_module() -> None:
    torch.manual_seed(0)
    model = Block().double()
    x = torch.randn(5, 6, dtype=torch.double)
    u = model.down(x).detach()
    adapter = dt.attach(model, dt.Houlsby(size=3, targets="down", norms="norm"))
    randomise(adapter, 0.5)
    p = {n.rsplit(".", 1)[1]: t.detach() for n, t in adapter.named_parameters() if n.startswith("down.")}
    gain, bias = (t.detach() for n, t in adapter.named_parameters() if n.startswith("norm."))
    for row, y in zip(u, model(x), strict=True):
        h = [gelu_tanh((p["down"][i] @ row + p["down_bias"][i]).item()) for i in range(3)]
        add = [sum(p["up"][j, i].item() * h[i] for i in range(3)) + p["up_bias"][j].item() for j in range(4)]
        new = row + torch.tensor(add, dtype=torch.double)
        want = (new - new.mean()) / (new.var(correction=0) + 1e-5).sqrt() * gain + bias
        torch.testing.assert_close(y, want, atol=1e-12, rtol=0)


def test_an_adapter_with_zero_up_projection_does_nothing() -> None:
    model = tiny("llama")
    batch = inputs(model)
    want = model(**batch).logits
    adapter = dt.attach(model, dt.Houlsby(size=4, norms=None))
    randomise(adapter)
    assert not torch.equal(model(**batch).logits, want)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if name.rsplit(".", 1)[1] in ("up", "up_bias"):
                p.zero_()
    assert torch.equal(model(**batch).logits, want)


def test_near_identity_start() -> None:
    """sec. 3.6: both projections normal with deviation 0.01, cut at two deviations (which leaves 0.88 of it)."""
    model = tiny("bert")
    batch = inputs(model)
    want = model(**batch).logits
    adapter = dt.attach(model, dt.Houlsby(size=64, init=dt.NearIdentity()))
    for _, unit in adapter.units():
        if isinstance(unit, Bottleneck):
            for p in (unit.down, unit.up):
                assert 0.0075 < p.std() < 0.0095 and p.abs().max() <= 0.02
    moved = (model(**batch).logits - want).abs().max()
    assert 0 < moved < 0.05


def test_training_moves_adapters_and_norms_only() -> None:
    torch.manual_seed(0)
    model = tiny("gpt2")
    batch = inputs(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if ".adapters." not in k}
    adapter = dt.attach(model, dt.Houlsby(size=4))
    start = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in adapter.named_parameters())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_size_is_checked() -> None:
    with pytest.raises(dt.DeltatuneError, match="size must be at least 1, got 0"):
        dt.Houlsby(size=0)
