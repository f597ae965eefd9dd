"""Recomputed blocks: the same gradients from fewer kept tensors."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runs import whole_run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import deltatune as dt
from deltatune.core.errors import DeltatuneError
from deltatune.data import Batches, Example
from deltatune.models.blocks import blocked
from deltatune.models.tiny import tiny
from deltatune.train import recompute
from deltatune.train.loss import autocast, outcome
from deltatune.train.options import TrainOptions
from deltatune.train.recompute import recomputing

CPU = torch.device("cpu")
ROWS = [Example([3, 4, 5, *range(6, 16 + i)], [-100] * 6 + [*range(9, 16 + i)], f"d{i}") for i in range(8)]
METHODS = {
    "lora": dt.LoRA(r=4, dropout=0.5), "dora": dt.DoRA(inner=dt.LoRA(r=4, dropout=0.5)), "ia3": dt.IA3(),
    "oft": dt.OFT(block_size=8), "houlsby": dt.Houlsby(), "loha": dt.LoHa(), "mixture": dt.Mixture(n=2),
    "prefix": dt.PrefixTuning(length=3), "bitfit": dt.BitFit(),
}  # fmt: skip


def _made(family: str, method: dt.Method, **config: Any) -> tuple[Any, dt.Adapter]:
    torch.manual_seed(0)
    model = tiny(family, **config)
    adapter = dt.attach(model.train(), method)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, adapter


def _batches(packing: bool = False) -> Batches:
    return Batches(ROWS, tokens_per_batch=256, packing=packing, blocked=packing)


def _gradients(
    model: Any, adapter: dt.Adapter, what: Any, packing: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """And the numbers that are drawn next."""
    model.zero_grad()
    torch.manual_seed(1)
    (batch,) = _batches(packing).once()
    with recomputing(model, what), blocked(model) if packing else nullcontext():
        with autocast(CPU, dtype):
            total = outcome(model, batch, "causal").total
        total.backward()
    return [p.grad.clone() for p in adapter.parameters() if p.grad is not None], torch.rand(3)


@pytest.mark.parametrize("what", ["blocks", "products"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same(method: str, family: str, what: str) -> None:
    if (method, family) == ("bitfit", "llama"):
        family = "qwen2"  # the one with biases
    dropout = {"attn_pdrop": 0.2, "resid_pdrop": 0.2} if family == "gpt2" else {"attention_dropout": 0.2}
    model, adapter = _made(family, METHODS[method], **dropout)
    (want, after), (got, then) = (_gradients(model, adapter, w) for w in ("none", what))
    assert want and len(got) == len(want) and torch.equal(after, then)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("what", ["blocks", "products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_in_one_row_keep_their_layout(dtype: torch.dtype, what: str) -> None:
    model, adapter = _made("llama", dt.LoRA(r=4, dropout=0.5))
    (want, _), (got, _) = (_gradients(model, adapter, w, True, dtype) for w in ("none", what))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


class Alive(TorchDispatchMode):
    """Bytes of the storages made inside that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = weakref.ref(storage)
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(s.nbytes() for r in self.made.values() if (s := r()) is not None)


@pytest.mark.parametrize("packing", [False, True])
def test_products_keep_more_than_blocks_and_less_than_everything(packing: bool) -> None:
    model, _ = _made("llama", dt.LoRA(r=4), num_hidden_layers=6)
    (batch,) = _batches(packing).once()
    kept = {}
    for what in ("blocks", "products", "none"):
        with recomputing(model, what), blocked(model) if packing else nullcontext(), Alive() as alive:
            total = outcome(model, batch, "causal").total
            kept[what] = alive.bytes()
            del total
    tokens = batch.inputs["input_ids"].numel()
    assert kept["blocks"] >= 6 * 4 * 32 * tokens  # the input of each block
    products = 6 * 4 * tokens * (32 + 2 * 16 + 32 + 2 * 64 + 32)  # of q, k and v, o, gate and up, down
    assert products <= kept["products"] - kept["blocks"] <= 1.5 * products
    assert kept["products"] < 0.75 * kept["none"]


def _sequence(work: Any, x: Tensor, w: Tensor, **how: Any) -> Tensor:
    return checkpoint(work, x, w, use_reentrant=False, **how)


def test_what_is_done_to_a_product_in_place_is_not_done_twice() -> None:
    def work(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).mul_(3).add_(1)
        return (y.view(-1).sin() * 2).view_as(y) @ w

    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    want = torch.autograd.grad(work(x, w).sum(), (x, w))
    got = torch.autograd.grad(_sequence(work, x, w, context_fn=recompute._contexts).sum(), (x, w))
    torch.testing.assert_close(got, want)


def test_a_product_that_changes_after_it_was_read_is_refused() -> None:
    def work(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        z = y.relu()
        return z + y.mul_(3)

    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    with pytest.raises(DeltatuneError, match="products is not possible here: aten.mul_.Tensor changes .* to blocks"):
        _sequence(work, x, w, context_fn=recompute._contexts)


def test_a_model_that_cannot_is_named() -> None:
    message = "activation_checkpointing: blocks is not possible in Linear; set it to none"
    with pytest.raises(DeltatuneError, match=message), recomputing(nn.Linear(2, 2), "blocks"):
        pass


def test_a_switch_is_a_choice_of_blocks() -> None:
    made = TrainOptions
    assert [made(activation_checkpointing=b).activation_checkpointing for b in (False, True)] == ["none", "blocks"]
    assert made().activation_checkpointing == "none"
    assert made(activation_checkpointing="products").activation_checkpointing == "products"
    with pytest.raises(DeltatuneError, match="input should be 'none', 'blocks' or 'products', got 'all'"):
        made(activation_checkpointing="all")


def test_a_run_is_the_same_whatever_it_keeps() -> None:
    runs = [whole_run(None, steps=3, activation_checkpointing=w)[2].history for w in ("none", "blocks", "products")]
    for name in ("loss", "grad_norm"):
        want, *others = ([record[name] for record in run] for run in runs)
        assert all(found == pytest.approx(want, rel=1e-5) for found in others)
