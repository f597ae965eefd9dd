"""PiSSA and OLoRA: what their factors are made of, that the base stays, and PEFT's numbers."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltatune as dt
from deltatune.models.tiny import inputs, tiny

DOUBLE = torch.double


def started(init: dt.Init, out: int, in_: int, r: int, alpha: float, seed: int = 0) -> tuple[nn.Linear, nn.Module]:
    torch.manual_seed(seed)
    model = nn.Linear(in_, out).double()
    adapter = dt.attach(model, dt.LoRA(r=r, alpha=alpha, init=init, targets=nn.Linear))
    return model, next(u for _, u in adapter.units())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.data(), st.floats(0.5, 32), st.integers(0, 99))
def test_pissa_takes_the_leading_triplets(out: int, in_: int, data: st.DataObject, alpha: float, seed: int) -> None:
    r = data.draw(st.integers(1, min(out, in_) - 1))
    model, delta = started(dt.PiSSA(), out, in_, r, alpha, seed)
    w, a, b, s = model.weight.detach(), delta.a.detach(), delta.b.detach(), delta.s
    sigma = torch.linalg.eigvalsh(w @ w.T if out <= in_ else w.T @ w).clamp(min=0).sqrt().flip(0)
    torch.testing.assert_close(torch.linalg.matrix_norm(w - s * b @ a, 2), sigma[r], atol=1e-7, rtol=1e-7)
    want = torch.diag(sigma[:r]) / s
    torch.testing.assert_close(b.T @ b, want, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(a @ a.T, want, atol=1e-9, rtol=1e-7)


def spiky(out: int, in_: int) -> Tensor:
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(out, in_, dtype=DOUBLE))
    v, _ = torch.linalg.qr(torch.randn(in_, in_, dtype=DOUBLE))
    return u @ torch.diag(2.0 ** -torch.arange(in_, dtype=DOUBLE)) @ v


def test_randomised_pissa_is_near_the_exact_one() -> None:
    w = spiky(40, 20)
    products = []
    for init in (dt.PiSSA(), dt.PiSSA(niter=4)):
        model = nn.Linear(20, 40, bias=False, dtype=DOUBLE)
        model.weight.data.copy_(w)
        delta = next(u for _, u in dt.attach(model, dt.LoRA(r=4, init=init, targets=nn.Linear)).units())
        products.append(delta.s * delta.b @ delta.a)
    torch.testing.assert_close(products[0], products[1], atol=1e-8, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.data(), st.floats(0.5, 32), st.integers(0, 99))
def test_olora_projects_on_a_basis(out: int, in_: int, data: st.DataObject, alpha: float, seed: int) -> None:
    r = data.draw(st.integers(1, min(out, in_)))
    model, delta = started(dt.OLoRA(), out, in_, r, alpha, seed)
    w, a, b = model.weight.detach(), delta.a.detach(), delta.b.detach()
    torch.testing.assert_close(b.T @ b, torch.eye(r, dtype=DOUBLE), atol=1e-10, rtol=0)
    torch.testing.assert_close(b @ a, b @ b.T @ w, atol=1e-10, rtol=0)
    torch.testing.assert_close((w - b @ a)[:, :r], torch.zeros(out, r, dtype=DOUBLE), atol=1e-10, rtol=0)


@pytest.mark.parametrize("init", [dt.PiSSA(), dt.PiSSA(niter=4), dt.OLoRA()], ids=["pissa", "randomised", "olora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_base_is_not_rewritten_and_the_output_starts_at_it(family: str, init: dt.Init, tmp_path) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    batch, before = inputs(model), {k: v.clone() for k, v in model.state_dict().items()}
    want = model(**batch).logits
    adapter = dt.attach(model, dt.LoRA(r=4, init=init))
    torch.testing.assert_close(model(**batch).logits, want, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.1)
    moved = model(**batch).logits
    assert (moved - want).abs().max() > 1e-3
    adapter.save(tmp_path)
    dt.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    back = dt.load(model, tmp_path)
    torch.testing.assert_close(model(**batch).logits, moved)
    for (_, a), (_, b) in zip(back.units(), adapter.units(), strict=True):
        assert torch.equal(a.a, b.a)


@pytest.mark.parametrize("name, init", [("pissa", dt.PiSSA()), ("olora", dt.OLoRA())])
def test_peft_starts_from_the_same_product(name: str, init: dt.Init) -> None:
    torch.manual_seed(0)
    ours = tiny("llama")
    config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=name, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    adapter = dt.attach(ours, dt.LoRA(r=4, alpha=12, init=init, targets=("q_proj", "down_proj")))
    for path, _, unit, _ in adapter.sites():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(unit.b @ unit.a, b @ a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(unit.a.abs(), a.abs(), atol=1e-5, rtol=1e-4)  # the signs of a triplet are free
        torch.testing.assert_close(unit.b.abs(), b.abs(), atol=1e-5, rtol=1e-4)


def test_fits_a_bf16_base_and_says_when_the_rank_does_not() -> None:
    model = tiny("llama").bfloat16()
    adapter = dt.attach(model, dt.LoRA(r=4, init=dt.PiSSA()))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert model(**inputs(model)).logits.dtype == torch.bfloat16
    for init in (dt.PiSSA(), dt.OLoRA()):
        with pytest.raises(dt.DeltatuneError, match=r"r=5, .*weight \(4, 6\).*give r <= 4"):
            dt.attach(nn.Linear(6, 4), dt.LoRA(r=5, init=init, targets=nn.Linear))
    with pytest.raises(dt.DeltatuneError, match="alpha > 0"):
        dt.attach(nn.Linear(6, 4), dt.LoRA(r=2, alpha=-1, init=dt.PiSSA(), targets=nn.Linear))
