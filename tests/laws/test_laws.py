"""What every method promises on every architecture."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from table import METHODS, MOVED_AT_START, REFUSED, attach, batch, cases, logits, loss, model, perturb

import deltatune as dt
from deltatune.core import Delta
from deltatune.storage import layers

case = pytest.mark.parametrize("method,architecture", cases())


@pytest.mark.parametrize("method,architecture", sorted(REFUSED))
def test_what_does_not_fit_is_refused_and_nothing_changes(method, architecture):
    net = model(architecture)
    types = [type(m) for m in net.modules()]
    with pytest.raises(dt.DeltatuneError):
        dt.attach(net, METHODS[method])
    assert [type(m) for m in net.modules()] == types and all(p.requires_grad for p in net.parameters())


@case
def test_the_start_is_the_base(method, architecture):
    net = model(architecture)
    given = batch(net)
    want = logits(net, given)
    attach(net, METHODS[method])
    if method in MOVED_AT_START:
        assert not torch.allclose(logits(net, given), want, atol=1e-4)
    else:
        torch.testing.assert_close(logits(net, given), want, atol=2e-5, rtol=1e-4)


@case
def test_the_plan_is_what_attach_does(method, architecture):
    net = model(architecture)
    plan = dt.plan(net, METHODS[method])
    adapter = dt.attach(net, METHODS[method])
    assert plan.trained == sum(p.numel() for p in adapter.parameters())
    assert [s.path for s in plan.sites] and len(plan.sites) == sum(1 for _ in adapter.sites())


@case
def test_only_the_adapter_trains_and_it_learns(method, architecture):
    net = model(architecture)
    given = batch(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adapter = attach(net, METHODS[method])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(net, given)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 1e-3
    dt.detach(net)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)


@case
def test_every_parameter_gets_a_gradient(method, architecture):
    net = model(architecture)
    adapter = perturb(attach(net, METHODS[method]))
    loss(net, batch(net, 40)).backward()  # enough tokens for every expert
    assert not [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n, p in net.named_parameters() if p.grad is not None and "adapters" not in n.split(".")]


@case
def test_detach_restores_the_model_bit_for_bit(method, architecture):
    net = model(architecture)
    given, types, keys = batch(net), [type(m) for m in net.modules()], list(net.state_dict())
    want, implementation = logits(net, given), net.config._attn_implementation
    perturb(attach(net, METHODS[method]))
    assert not torch.allclose(logits(net, given), want)
    dt.detach(net)
    assert torch.equal(logits(net, given), want)
    assert [type(m) for m in net.modules()] == types and list(net.state_dict()) == keys
    assert all(p.requires_grad for p in net.parameters()) and net.config._attn_implementation == implementation


@case
def test_the_fast_forward_is_the_equation(method, architecture):
    net = model(architecture).double()
    adapter = perturb(attach(net, METHODS[method]))
    for _, module, unit, place in adapter.sites():
        if isinstance(unit, Delta) and layers.is_linear(module) and place == "weight":
            w, b = layers.read(module, "weight"), module.bias
            x = torch.randn(3, w.shape[1], dtype=w.dtype)
            units = [u for _, m, u, p in adapter.sites() if m is module and p == "weight"]
            others = [u for _, m, u, p in adapter.sites() if m is module and p == "bias"]
            for u in units:
                w, b = u.weight(w), None if b is None else u.bias(b)
            for u in others:
                b = u.weight(b)
            torch.testing.assert_close(module(x), F.linear(x, w, b), atol=1e-9, rtol=1e-9)


@case
def test_factors_are_the_delta(method, architecture):
    net = model(architecture).double()
    for _, module, unit, place in perturb(attach(net, METHODS[method])).sites():
        if isinstance(unit, Delta) and (factors := unit.factors()) is not None:
            w = layers.read(module, place)
            torch.testing.assert_close(unit.weight(w) - w, factors[0] @ factors[1], atol=1e-10, rtol=1e-9)


@case
def test_merged_equals_active_and_unmerge_is_exact(method, architecture):
    net = model(architecture)
    given = batch(net)
    base = {k: v.clone() for k, v in net.state_dict().items()}
    adapter = perturb(attach(net, METHODS[method]))
    want = logits(net, given)
    if not adapter.mergeable:
        with pytest.raises(dt.DeltatuneError, match="cannot be merged"):
            dt.merge(net)
        return
    dt.merge(net)
    got = logits(net, given)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    dt.unmerge(net)
    now = net.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in base.items()) and torch.equal(logits(net, given), want)


@case
def test_save_and_load_give_the_same_output(method, architecture, tmp_path):
    net, other = model(architecture), model(architecture)
    given = batch(net)
    perturb(attach(net, METHODS[method], "mine")).save(tmp_path)
    adapter = dt.load(other, tmp_path)
    # PEFT stores prefix keys rotated, so a round trip rounds them twice
    torch.testing.assert_close(logits(other, given), logits(net, given), atol=4e-6, rtol=1e-6)
    assert adapter.name == "mine" and not list(tmp_path.glob(".*"))


@case
def test_a_base_checkpoint_loads_under_an_adapter(method, architecture):
    net = model(architecture)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    attach(net, METHODS[method])
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all("adapters" in k.split(".") for k in missing)


@case
def test_deepcopy_and_pickle_keep_the_adapter(method, architecture):
    net = model(architecture)
    given, types = batch(net), {p: type(m) for p, m in net.named_modules()}
    perturb(attach(net, METHODS[method]))
    want = logits(net, given)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(isinstance(twin.get_submodule(p), t) for p, t in types.items())
        torch.testing.assert_close(logits(twin, given), want)
        perturb(dt.adapters(twin)["default"], seed=2)
        assert not torch.allclose(logits(twin, given), want)
        dt.activate(twin)
        assert not torch.allclose(logits(twin, given), want)
    torch.testing.assert_close(logits(net, given), want)


@case
def test_disabled_is_the_base(method, architecture):
    net = model(architecture)
    given = batch(net)
    want = logits(net, given)
    perturb(attach(net, METHODS[method]))
    dt.activate(net)
    torch.testing.assert_close(logits(net, given), want, atol=1e-6, rtol=1e-6)
