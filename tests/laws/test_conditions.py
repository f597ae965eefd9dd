"""The laws hold under lower precision, autocast, activation checkpointing and compilation."""

import copy

import pytest
import torch
from table import (
    ARCHITECTURES,
    CASES,
    METHODS,
    MOVED_AT_START,
    REFUSED,
    attach,
    batch,
    cases,
    logits,
    loss,
    model,
    perturb,
)

import deltatune as dt

case = pytest.mark.parametrize("method,architecture", cases())
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@half
@case
def test_a_half_precision_base_keeps_its_precision(method, architecture, dtype):
    net = model(architecture).to(dtype)
    given = batch(net)
    want = logits(net, given)
    adapter = attach(net, METHODS[method])
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    got = logits(net, given)
    assert got.dtype == dtype
    if method not in MOVED_AT_START:
        torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    loss(net, given).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())
    if adapter.mergeable:
        perturb(adapter)
        active = logits(net, given).float()
        true = logits(copy.deepcopy(net).double(), given).float()
        dt.merge(net)
        bound = max(0.1 * true.norm(), 2 * (active - true).norm())  # rounding W' may cost what rounding W cost
        assert (logits(net, given).float() - true).norm() < bound
        assert {p.dtype for n, p in net.named_parameters() if "adapters" not in n.split(".")} == {dtype}


@case
def test_the_adapter_takes_the_base_precision_when_asked(method, architecture):
    net = model(architecture).to(torch.bfloat16)
    adapter = attach(net, METHODS[method], dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    out = logits(net, batch(net))
    assert out.dtype == torch.bfloat16
    loss(net, batch(net)).backward()
    assert all(p.grad is not None for p in adapter.parameters())


@case
def test_autocast(method, architecture):
    net = model(architecture)
    given = batch(net)
    adapter = perturb(attach(net, METHODS[method]))
    want = logits(net, given)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(net, given)
        loss(net, given).backward()
    bound = 0.1 * want.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
    if adapter.mergeable:
        dt.merge(net)
        with torch.autocast("cpu", torch.bfloat16):
            bound = max(bound, 2 * (logits(net, given).float() - want).norm())  # what autocast costs the same weights
    assert (got.float() - want).norm() < bound


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@case
def test_activation_checkpointing_gives_the_same_gradients(method, architecture, reentrant):
    net = model(architecture)
    given = batch(net)
    adapter = perturb(attach(net, METHODS[method]))
    net.train()
    for module in net.modules():  # dropout would make the two runs differ
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(2)  # for what the method draws
    loss(net, given).backward()
    want = {n: p.grad.clone() for n, p in adapter.named_parameters()}
    net.zero_grad()
    net.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # the old kind needs an input that requires gradients
        net.enable_input_require_grads()
    torch.manual_seed(2)
    loss(net, given).backward()
    for n, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, want[n], atol=1e-4, rtol=1e-3)


COMPILED = [(m, a) for m, a in CASES if a in ("llama", "gpt2", "bert")]


@pytest.mark.parametrize("method,architecture", cases(COMPILED))
def test_compiles_into_one_graph(method, architecture):
    torch._dynamo.reset()
    net = model(architecture)
    given = batch(net)
    perturb(attach(net, METHODS[method]))
    want = logits(net, given)
    got = torch.compile(net, fullgraph=True, backend="eager")(**given).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_compiled_model_follows_activation_and_trains(method):
    torch._dynamo.reset()
    net = model("llama")
    given = batch(net)
    base = logits(net, given).detach()
    adapter = perturb(attach(net, METHODS[method]))
    want = logits(net, given).detach()
    fast = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(**given).logits.detach(), want, atol=1e-4, rtol=1e-4)
    fast(**given).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    dt.activate(net)
    torch.testing.assert_close(fast(**given).logits.detach(), base, atol=1e-4, rtol=1e-4)


def test_every_architecture_is_covered():
    assert {a for _, a in CASES} == set(ARCHITECTURES) and {m for m, _ in CASES} == set(METHODS)
    assert all(m in METHODS for m, _ in REFUSED)
