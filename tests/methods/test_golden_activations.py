"""Whole forward passes against GPT-2 written out in float64, with what the papers' equations change in it.

A ladder's is in `test_ladder`, that of pruned adapters in `test_sparse_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.methods.intrinsic_subspace import autoencoder
from deltatune.models.tiny import inputs, tiny

HEADS, BLOCKS = 4, 4
Change = Callable[[int], dict[str, Any]]


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) + bias


def core(x: Tensor, unit: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    return activation(x @ unit["down"].T + unit["down_bias"]) @ unit["up"].T + unit["up_bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, prefix: dict[str, Tensor] | None) -> Tensor:
    """softmax(q [P_K; K]^T / sqrt(d_h)) [P_V; V], head by head; every token sees all of the prefix."""
    n, size = q.shape[1], q.shape[2] // HEADS
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    out = []
    for head in range(HEADS):
        one, two, three = (t[..., head * size : (head + 1) * size] for t in (q, k, v))
        if prefix is not None:
            two, three = (
                torch.cat([prefix[name][head].expand(len(q), -1, -1), t], 1) for name, t in (("k", two), ("v", three))
            )
        p = two.shape[1] - n
        scores = one @ two.mT / math.sqrt(size)
        scores = scores.masked_fill(~torch.cat([torch.ones(n, p, dtype=torch.bool), seen], 1), -math.inf)
        out.append(scores.softmax(-1) @ three)
    return torch.cat(out, -1)


def gpt2(w: dict[str, Tensor], ids: Tensor, change: Change = lambda i: {}, prompt: Tensor | None = None) -> Tensor:
    """Logits of the tokens. `change`: of block i an `adapter` at its end or on its feed-forward `ffn`, `lora` of q and
    v with its factor, a `prefix`, and `bias` vectors by name."""
    x = w["transformer.wte.weight"][ids]
    if prompt is not None:
        x = torch.cat([prompt.expand(len(ids), -1, -1), x], 1)
    x = x + w["transformer.wpe.weight"][: x.shape[1]]
    for i in range(BLOCKS):
        its = change(i)

        def weight(name: str, i: int = i) -> Tensor:
            return w[f"transformer.h.{i}.{name}.weight"]

        def bias(name: str, i: int = i, its: dict[str, Any] = its) -> Tensor:
            return its.get("bias", {}).get(name, w[f"transformer.h.{i}.{name}.bias"])

        a = norm(x, weight("ln_1"), bias("ln_1"))
        q, k, v = (a @ weight("attn.c_attn") + bias("attn.c_attn")).chunk(3, -1)
        if "lora" in its:
            (qa, qb), (va, vb), s = its["lora"]
            q, v = q + s * a @ qa.T @ qb.T, v + s * a @ va.T @ vb.T
        x = x + attend(q, k, v, its.get("prefix")) @ weight("attn.c_proj") + bias("attn.c_proj")
        h = gelu_tanh(norm(x, weight("ln_2"), bias("ln_2")) @ weight("mlp.c_fc") + bias("mlp.c_fc"))
        u = h @ weight("mlp.c_proj") + bias("mlp.c_proj")
        if "ffn" in its:
            u = u + core(u, its["ffn"], gelu_tanh)
        x = x + u
        if "adapter" in its:
            x = x + core(x, its["adapter"], torch.relu)
    x = norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])[:, 0 if prompt is None else len(prompt) :]
    return x @ w["transformer.wte.weight"].T


def case(attach: Callable[[Any], dt.Adapter]) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The model under an adapter away from its start; the base's tensors and the adapter's; token ids."""
    torch.manual_seed(0)
    model = tiny("gpt2", n_layer=BLOCKS).double()
    w = {n: t.clone() for n, t in model.state_dict().items()}
    adapter = attach(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    state = {n.removeprefix("transformer."): t.detach() for n, t in adapter.state_dict().items()}
    return model, w, state, inputs(model, batch=3)["input_ids"]


def of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def check(model: Any, w: dict[str, Tensor], ids: Tensor, want: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-9, rtol=1e-9)
        assert (want - gpt2(w, ids)).abs().max() > 0.1
        with dt.using(model):
            torch.testing.assert_close(model(input_ids=ids).logits, gpt2(w, ids), atol=1e-9, rtol=1e-9)


def test_intrinsic_prompt() -> None:
    """P = W_3 tanh(W_2 z + b_2) + b_3 before the tokens."""
    model, w, state, ids = case(lambda m: dt.attach(m, dt.IntrinsicPrompt(length=3, dim=5, hidden=7)))
    own = {n.rpartition("source.")[2]: t for n, t in state.items()}
    h = torch.tanh(own["decoder.0.weight"] @ own["z"] + own["decoder.0.bias"])
    check(model, w, ids, gpt2(w, ids, prompt=(own["decoder.2.weight"] @ h + own["decoder.2.bias"]).view(3, 32)))


def test_intrinsic_subspace() -> None:
    """P'_t = W_3 tanh(W_2 (W_1 P_t + b_1) + b_2) + b_3, t being the row's task."""
    tuned = {t: torch.randn(3, 32, generator=torch.Generator().manual_seed(i)) for i, t in enumerate(("a", "b"))}
    model, w, state, ids = case(lambda m: autoencoder(m, tuned, dim=5, hidden=7))
    own = {n.rpartition("source.")[2]: t for n, t in state.items()}
    for task, prompt in tuned.items():
        z = own["encoder.weight"] @ prompt.double().flatten() + own["encoder.bias"]
        h = torch.tanh(own["decoder.0.weight"] @ z + own["decoder.0.bias"])
        want = gpt2(w, ids, prompt=(own["decoder.2.weight"] @ h + own["decoder.2.bias"]).view(3, 32))
        with dt.using(model, router=dt.PerRow([f"subspace.{task}"])):
            check(model, w, ids, want)


@pytest.mark.parametrize("n", [None, 2])
def test_adapter_drop(n: int | None) -> None:
    """Blocks below n have none; h2 = f(u + h1) + u + h1 in those above."""
    method = dt.AdapterDrop(inner=dt.Pfeiffer(size=3), n=n)
    model, w, state, ids = case(lambda m: dt.attach(m, method))
    units = {i: of(state, f"h.{i}.0." if n else f"h.{i}.0.inner.") for i in range(BLOCKS)}
    assert [i for i, unit in units.items() if unit] == list(range(n or 0, BLOCKS))
    check(model, w, ids, gpt2(w, ids, lambda i: {"adapter": units[i]} if units[i] else {}))


@pytest.mark.parametrize("sharing", ["up", "none"])
def test_adamix(sharing: Any) -> None:
    """u' = u + W_up gelu(W_down u + b_down) + b_up of the means over the copies."""
    method = dt.AdaMix(expert=dt.Houlsby(size=3, norms=None), n=3, sharing=sharing)
    model, w, state, ids = case(lambda m: dt.attach(m, method))

    def mean(name: str, t: Tensor) -> Tensor:
        return t if sharing == "up" and name.startswith("up") else (t[0] + t[1] + t[2]) / 3

    units = {i: {n: mean(n, t) for n, t in of(state, f"h.{i}.mlp.c_proj.0.").items()} for i in range(BLOCKS)}
    check(model, w, ids, gpt2(w, ids, lambda i: {"ffn": units[i]}))


def test_s4() -> None:
    """A block of each group: adapter and LoRA; adapter and prefix; these and biases; prefix, biases and LoRA."""
    model, w, state, ids = case(lambda m: dt.attach(m, dt.S4(budget=1500, groups=(1, 1, 1, 1))))
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")

    def change(i: int) -> dict[str, Any]:
        own = of(state, f"h.{i}.")
        found: dict[str, Any] = {}
        if i < 3:
            found["adapter"] = of(own, "0.")
        if i in (0, 3):
            q, v = (of(own, f"attn.c_attn.{j}.inner.") for j in (0, 1))
            found["lora"] = (q["a"], q["b"]), (v["a"], v["b"]), 2.0
        if i > 0:
            found["prefix"] = of(own, "attn.0.source.")
        if i > 1:
            found["bias"] = {n: own[f"{n}.{2 if (n, i) == ('attn.c_attn', 3) else 0}.v"] for n in names}
        return found

    used = sum(len(of(state, f"h.{i}.")) for i in range(BLOCKS))
    assert used == len(state) == 8 + 6 + 12 + 12
    check(model, w, ids, gpt2(w, ids, change))
