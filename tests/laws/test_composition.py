"""Several adapters on one model: switched, stacked, in threads, and each in its own rows of one batch."""

import threading

import pytest
import torch
from table import ARCHITECTURES, METHODS, REFUSED, attach, batch, logits, loss, model, perturb

import deltatune as dt

PAIRS = [
    (one, two, a)
    for one, two in [("lora", "dora"), ("lora", "lora"), ("ia3", "bitfit"), ("lora on q, v", "ia3"), ("head", "lora"),
                     ("bitfit", "dora"), ("lora on embedding", "lora + head"),
                     ("houlsby", "mixture"), ("parallel", "lora"), ("prompt", "prefix"),
                     ("prompt", "lora"), ("mam", "adalora"), ("lora, stages", "lora, eva")]
    for a in ARCHITECTURES
    if not {(one, a), (two, a)} & REFUSED
]  # fmt: skip
ACTIVATIONS = {"houlsby", "parallel", "mixture", "prompt", "prefix", "mam"}  # methods that cannot be merged
pair = pytest.mark.parametrize("one,two,architecture", PAIRS)


def two_adapters(one, two, architecture):
    net = model(architecture)
    for name, method, seed in (("one", one, 1), ("two", two, 2)):
        perturb(attach(net, METHODS[method], name), seed)
    return net


@pair
def test_rows_of_one_batch_name_their_adapters(one, two, architecture):
    net = two_adapters(one, two, architecture)
    given = batch(net, 5)
    alone = {}
    for name in ("one", "two", None):
        dt.activate(net, *([name] if name else []))
        alone[name] = logits(net, given)
    names = ["two", None, "one", "two", "one"]
    dt.activate(net, router=dt.PerRow(names))
    mixed = logits(net, given)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone["one"], alone["two"]) and not torch.allclose(alone["one"], alone[None])


@pair
def test_gradients_of_mixed_rows_are_those_of_separate_runs(one, two, architecture):
    net = two_adapters(one, two, architecture)
    given = batch(net, 4)
    names = ["one", "two", "two", "one"]
    weight = torch.randn(logits(net, given).shape)
    want = {}
    for name in ("one", "two"):
        dt.activate(net, name)
        rows = torch.tensor([n == name for n in names])
        adapter = dt.adapters(net)[name]
        (logits(net, given) * weight)[rows].sum().backward()
        want[name] = [p.grad.clone() for p in adapter.parameters()]
        net.zero_grad()
    dt.activate(net, router=dt.PerRow(names))
    (logits(net, given) * weight).sum().backward()
    for name, grads in want.items():
        for p, g in zip(dt.adapters(net)[name].parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, g, atol=1e-4 * g.abs().max().item() + 1e-5, rtol=1e-3)


@pair
def test_stacked_adapters_train(one, two, architecture):
    net = model(architecture)
    attach(net, METHODS[one], "one")
    adapter = attach(net, METHODS[two], "two")
    dt.activate(net, "one", "two")
    given = batch(net)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    first = loss(net, given)
    for _ in range(6):
        optimizer.zero_grad()
        loss(net, given).backward()
        optimizer.step()
    assert loss(net, given) < first


@pytest.mark.parametrize("one,two,architecture", [p for p in PAIRS if {p[0], p[1]}.isdisjoint(ACTIVATIONS)])
def test_stacked_deltas_are_applied_one_after_the_other(one, two, architecture):
    net = two_adapters(one, two, architecture)
    given = batch(net)
    dt.activate(net, "one", "two")
    stacked = logits(net, given)
    dt.merge(net, "one")
    dt.merge(net, "two")
    torch.testing.assert_close(logits(net, given), stacked, atol=2e-4, rtol=1e-3)
    with pytest.raises(dt.DeltatuneError, match="merged over"):
        dt.unmerge(net, "one")
    dt.unmerge(net)
    torch.testing.assert_close(logits(net, given), stacked)


def test_two_threads_with_different_adapters_get_their_own_results():
    net = two_adapters("lora on embedding", "dora", "llama")
    given = batch(net)
    want = {}
    for name in ("one", "two"):
        dt.activate(net, name)
        want[name] = logits(net, given).detach()
    dt.activate(net)
    base = logits(net, given).detach()
    wrong, start = [], threading.Barrier(2)

    def serve(name):
        start.wait()
        for _ in range(40):
            with dt.using(net, name), torch.no_grad():
                if not torch.allclose(logits(net, given), want[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(n,)) for n in want]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    torch.testing.assert_close(logits(net, given).detach(), base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activation_costs_the_same_whatever_the_number_of_adapters_and_layers(architecture):
    """Counted, not timed: activating touches one object, never a slot."""
    net = model(architecture)
    for i in range(3):
        dt.attach(net, METHODS["lora"], f"a{i}")
    seen = []
    modules = torch.nn.Module.named_modules, torch.nn.Module.modules
    try:
        torch.nn.Module.modules = torch.nn.Module.named_modules = lambda *a, **k: seen.append(1) or iter(())
        walked = dt.core.slot.walk
        dt.core.slot.walk = lambda *a: seen.append(1) or iter(())
        dt.activate(net, "a1")
        with dt.using(net, "a2"):
            pass
    finally:
        torch.nn.Module.named_modules, torch.nn.Module.modules = modules
        dt.core.slot.walk = walked
    assert not seen


def test_rows_may_be_beams_or_flattened_tokens_but_not_a_fraction():
    net = two_adapters("lora", "ia3", "llama")
    dt.activate(net, router=dt.PerRow(["one", "two"]))
    given = batch(net, 4)
    mixed = logits(net, given)
    dt.activate(net, "one")
    torch.testing.assert_close(mixed[:2], logits(net, given)[:2], atol=1e-5, rtol=1e-4)
    dt.activate(net, router=dt.PerRow(["one", "two"]))
    with pytest.raises(dt.DeltatuneError, match="names 2 rows; this call's batch has 3"):
        logits(net, batch(net, 3))
