"""Sparse differences (Random Masking, arXiv:2405.02596): the places, the gathered gradient, what is kept, and PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from selective import changed, go, loss, marked, network, same
from torch import nn

import deltatune as dt
from deltatune.core import Events, Run
from deltatune.models.tiny import inputs, tiny


def places(model: nn.Module, **options: object) -> dict[str, torch.Tensor]:
    adapter = dt.attach(model, dt.Sparse(**{"targets": nn.Linear, "density": 0.25} | options))
    found = {path: unit.indices.clone() for path, _, unit, _ in adapter.sites()}
    dt.detach(model)
    return found


def test_random_places_depend_on_the_seed_and_the_site_alone() -> None:
    model = network()
    one, again, other = (places(model, seed=s) for s in (3, 3, 4))
    assert [len(i) for i in one.values()] == [12, 10] and all(i.unique().numel() == i.numel() for i in one.values())
    assert same(one, again) and not same(one, other)
    assert torch.equal(places(model, seed=3, targets="3")["3"], one["3"])


def test_magnitude_marks_the_largest_weights() -> None:
    model = network()
    for path, indices in places(model, coordinates="magnitude").items():
        w = model.get_submodule(path).weight.detach().abs().flatten()
        mask = torch.zeros_like(w, dtype=torch.bool).index_fill(0, indices.long(), True)
        assert w[mask].min() > w[~mask].max()


def test_given_places() -> None:
    assert places(network(), given={"0": (7, 2)})["0"].tolist() == [2, 7]
    for wrong in ((2, 2), (48,), (-1,)):
        with pytest.raises(dt.DeltatuneError, match="0: places must be distinct and lie in 0 ... 47"):
            places(network(), given={"0": wrong})
    with pytest.raises(dt.DeltatuneError, match="density=0.001 of 48 places is none"):
        places(network(), density=0.001)
    with pytest.raises(dt.DeltatuneError, match=r"density must lie in \(0, 1\], got 1.5"):
        dt.Sparse(density=1.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_gradient_is_the_dense_one_gathered(family: str) -> None:
    torch.manual_seed(0)
    model = tiny(family).double()
    batch = inputs(model)
    targets = (dt.core.Part("q", "down"), dt.core.Part("embedding"))
    model.requires_grad_(True)
    model(**batch).logits.square().sum().backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())  # only the embedding's own part of a tied gradient
        model(**batch).logits.square().sum().backward()
        dense = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    adapter = dt.attach(model, dt.Sparse(density=0.2, targets=targets))
    model(**batch).logits.square().sum().backward()
    for path, module, unit, at in adapter.sites():
        inner = getattr(unit, "inner", unit)  # the rows of a fused projection
        g = dense[f"{path}.{at}"]
        g = g.T if type(module).__name__.endswith("Conv1D") else g
        g = g if inner is unit else g[unit.rows]
        torch.testing.assert_close(inner.values.grad, g.flatten()[inner.indices.long()], rtol=1e-9, atol=1e-11)


def test_gradcheck_through_stacked_units() -> None:
    """Values, input and bias of one, under another whose weight passes the gradient on."""
    model = nn.Linear(4, 3).double()
    one = dt.attach(model, dt.Sparse(density=0.5, targets=nn.Linear, seed=1), "one")
    two = dt.attach(model, dt.Sparse(density=0.5, targets=nn.Linear, seed=2), "two")
    dt.activate(model, "one", "two")
    x = torch.randn(2, 4).double().requires_grad_()
    values = [*one.parameters(), *two.parameters()]
    with torch.no_grad():
        for v in values:
            v.normal_()
    model.bias.requires_grad_()
    torch.autograd.gradcheck(lambda *_: model(x), (x, model.bias, *values))


def test_no_copy_of_the_weight_waits_for_the_backward_pass() -> None:
    model = nn.Linear(16, 16, bias=False)
    dt.attach(model, dt.Sparse(density=0.1, targets=nn.Linear))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 16))
    whole = [t for t in kept if t.numel() == 256]
    assert len(whole) == 1 and whole[0].data_ptr() == model.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_outside_the_places_nothing_changes_under_weight_decay(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    adapter = dt.attach(model, dt.Sparse(density=0.25, targets=nn.Linear))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.5)
    if dtype is torch.float64:
        go(Run(model, adapter, 5, optimizer=optimizer), Events(), 5)
    else:
        for _ in range(5):
            loss(model, torch.randn(4, 6).to(dtype), torch.randn(4, 5).to(dtype)).backward()
            optimizer.step()
    moved = changed(model)
    assert all(not moved[n].any() for n in ("0.bias", "3.bias"))
    assert all(torch.equal(moved[n], mask) for n, mask in marked(adapter).items())


def test_a_file_brings_its_places(tmp_path) -> None:
    model = network().eval()
    adapter = dt.attach(model, dt.Sparse(density=0.25, targets=nn.Linear))
    for u, n in zip((u for _, u in adapter.units()), (3, 0), strict=True):
        u.move_to(torch.randperm(40)[:n])  # as a global choice does: another number than at the start
        u.values.data.normal_()
    x = torch.randn(3, 6).double()
    want = model(x)
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.save(tmp_path)
    dt.detach(model)
    loaded = dt.load(model, tmp_path)
    assert torch.equal(model(x), want) and [u.values.numel() for _, u in loaded.units()] == [3, 0]
    with pytest.raises(dt.DeltatuneError, match="one value at each of its indices"):
        loaded.load_state_dict(state | {"0.0.values": torch.zeros(2)})


def test_parity_with_peft_shira() -> None:
    """PEFT's SHiRA adds a sparse matrix, too: its places and values, copied across, give its outputs."""
    torch.manual_seed(0)
    ours, names = tiny("llama"), ["q_proj", "down_proj"]
    batch = inputs(ours)
    theirs_base = tiny("llama")
    theirs_base.load_state_dict(ours.state_dict())
    config = peft.ShiraConfig(r=2, target_modules=names, mask_type="random", init_weights=False)
    theirs = peft.get_peft_model(theirs_base, config)
    adapter = dt.attach(ours, dt.Sparse(targets=tuple(names)))
    with torch.no_grad():
        for path, module, unit, _ in adapter.sites():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            row, column = layer.shira_indices["default"].long()
            unit.move_to(row * module.in_features + column)
            unit.values.copy_(layer.shira_weight["default"].normal_())
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)
