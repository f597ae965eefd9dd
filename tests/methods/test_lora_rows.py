"""LoRA adapters in rows of their own of one batch, in one product with the base: `PerRow`."""

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.units import Base
from deltatune.kernels import lowrank_rows
from deltatune.methods.lora import LowRank

METHODS = {
    "one": dt.LoRA(r=2, dropout=0.3, targets=nn.Linear),
    "two": dt.LoRA(r=5, alpha=3, dropout=0.5, targets=nn.Linear),
    "three": dt.LoRA(r=3, init=dt.PiSSA(), targets="0"),
}


def net(*names, **others):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6, bias=False)).double()
    g = torch.Generator().manual_seed(1)
    for name, method in ({n: METHODS[n] for n in names} | others).items():
        for p in dt.attach(model, method, name).parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


@pytest.fixture
def grouped(monkeypatch):
    """The numbers of adapters of every product that was made for rows together."""
    seen, real = [], Base.plus_in_rows

    def plus_in_rows(self, x, rows, products):
        y = real(self, x, rows, products)
        if y is not None:
            seen.append(len(products))
        return y

    monkeypatch.setattr(Base, "plus_in_rows", plus_in_rows)
    return seen


def step(model, names, x):
    """Output and gradients of a step whose random numbers are always the same."""
    model.zero_grad()
    torch.manual_seed(5)
    dt.activate(model, router=dt.PerRow(names))
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if "adapters" in n}


ROWS = [
    ["one", "two", None, "three"],
    ["two", "one", "two", "one"],
    ["one"] * 3 + ["three"],
    [None, None, "two", "two"],
]


@pytest.mark.parametrize("shape", [(4, 3, 12), (4, 12), (8, 12), (4, 2, 3, 12)], ids=str)
@pytest.mark.parametrize("names", ROWS, ids=str)
def test_it_is_the_step_of_rows_run_apart_dropout_and_gradients_included(names, shape, grouped, monkeypatch):
    model = net(*METHODS)
    x = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    y, grads = step(model, names, x)
    first = sorted({n for n in names if n})
    assert grouped == [len(first), len(set(first) - {"three"})]
    monkeypatch.setattr(LowRank, "batched", dt.core.Intervention.batched)
    want, apart = step(model, names, x)
    assert len(grouped) == 2
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert grads.keys() == apart.keys()
    for name, g in grads.items():
        assert (g is None) == (apart[name] is None) == (name.split(".")[3] not in names)
        if g is not None:
            torch.testing.assert_close(g, apart[name], rtol=1e-11, atol=1e-11)


def test_each_row_is_that_of_its_adapter_alone(grouped):
    model = net(*METHODS).eval()
    x = torch.randn(4, 3, 12, dtype=torch.double)
    names = ["two", None, "three", "one"]
    with dt.using(model, router=dt.PerRow(names)):
        mixed = model(x)
    assert grouped
    for i, name in enumerate(names):
        with dt.using(model, *([name] if name else [])):
            torch.testing.assert_close(mixed[i], model(x)[i], rtol=1e-12, atol=1e-12)


OTHERS = {
    "another delta": dt.IA3(targets=nn.Linear, on_input=None),
    "nested ranks": dt.DyLoRA(r=3, targets=nn.Linear),
    "a magnitude": dt.DoRA(inner=dt.LoRA(r=2), targets=nn.Linear),
    "two at a site": dt.Union(methods=(dt.LoRA(r=2, targets=nn.Linear), dt.BitFit(targets="0"))),
}


@pytest.mark.parametrize("other", OTHERS)
def test_beside_anything_but_a_plain_lora_rows_are_run_apart(other, grouped):
    model = net("one", other=OTHERS[other]).eval()
    x = torch.randn(3, 12, dtype=torch.double)
    with dt.using(model, router=dt.PerRow(["one", "other", "one"])):
        mixed = model(x)
    assert len(grouped) == (1 if other == "two at a site" else 0)  # there only the second layer has a LoRA alone
    for i, name in enumerate(("one", "other", "one")):
        with dt.using(model, name):
            torch.testing.assert_close(mixed[i], model(x)[i], rtol=1e-12, atol=1e-12)


def test_so_are_those_of_what_an_earlier_stage_left(grouped):
    model = net("one", "two").eval()
    for _, unit in dt.adapters(model)["two"].units():
        unit.unload(0.5)
    x = torch.randn(2, 12, dtype=torch.double)
    with dt.using(model, router=dt.PerRow(["one", "two"])):
        mixed = model(x)
    assert not grouped
    with dt.using(model, "two"):
        torch.testing.assert_close(mixed[1], model(x)[1], rtol=1e-12, atol=1e-12)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer", [nn.Embedding(12, 10), nn.Conv1d(12, 10, 3), Doubled(12, 10)], ids=str)
def test_so_are_those_of_layers_with_another_forward(layer, grouped):
    model = nn.Sequential(layer.double())
    for seed, name in enumerate(("one", "two")):
        g = torch.Generator().manual_seed(seed)
        for p in dt.attach(model, dt.LoRA(r=2, targets="0"), name).parameters():
            p.data.normal_(generator=g)
    ids = isinstance(layer, nn.Embedding)
    x = torch.arange(6).view(2, 3) if ids else torch.randn(2, 12, 12, dtype=torch.double)
    with dt.using(model, router=dt.PerRow(["two", "one"])):
        mixed = model(x)
    assert not grouped
    for i, name in enumerate(("two", "one")):
        with dt.using(model, name):
            torch.testing.assert_close(mixed[i], model(x)[i], rtol=1e-12, atol=1e-12)


def test_where_rows_lie_is_asked_once_a_batch(monkeypatch):
    """Each asking waits for a device."""
    model, asked = net("one", "two"), []
    real = lowrank_rows._segments
    monkeypatch.setattr(lowrank_rows, "_segments", lambda rows: asked.append(len(rows)) or real(rows))
    for n, names in enumerate((["one", "two"], ["two", None, "one"]), 1):
        dt.activate(model, router=dt.PerRow(names))
        model(torch.randn(len(names), 12, dtype=torch.float64))  # two layers with both adapters
        assert len(asked) == n
    model(torch.randn(6, 12, dtype=torch.float64))  # beams: the rows twice
    assert asked == [2, 3, 6]
