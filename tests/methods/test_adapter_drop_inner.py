"""AdapterDrop of what holds more than its own tensors: a fusion of other adapters, a head with classes of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.models.tiny import inputs, tiny

LORA = dt.LoRA(r=2)


def randomise(adapter: dt.Adapter) -> dt.Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return adapter


def deep(family: str) -> Any:
    torch.manual_seed(0)
    return tiny(family, num_hidden_layers=4)


@pytest.mark.parametrize("n", [None, 1])
def test_a_fusion_is_dropped_saved_and_cut(n: int | None, tmp_path: Any) -> None:
    model = deep("llama")
    for name in ("a", "b"):
        dt.attach(model, dt.Pfeiffer(size=2, init=dt.NearIdentity(std=0.3)), name)
    adapter = randomise(dt.attach(model, dt.AdapterDrop(inner=dt.AdapterFusion(adapters=("a", "b")), n=n), "fused"))
    given = inputs(model)
    want = model(**given).logits
    with dt.AdapterFusion.attention(adapter) as seen:
        model(**given)
    assert list(seen) == [f"model.layers.{i}" for i in range(n or 0, 4)] and all(len(a) == 1 for a in seen.values())
    adapter.save(tmp_path)
    other = deep("llama")
    dt.load(other, tmp_path)  # which needs no adapter beside the file
    assert torch.equal(other(**given).logits, want)
    dt.detach(model, "a", "b")
    cut = dt.AdapterDrop.drop(adapter, 2, "cut")
    assert {path for path, *_ in cut.sites()} == {"model.layers.2", "model.layers.3"}
    assert not torch.equal(model(**given).logits, want)


@pytest.mark.parametrize("wrap", [
    lambda m: dt.AdapterDrop(inner=m, n=1), lambda m: dt.AdapterDrop(inner=m), lambda m: dt.SparseAdapter(inner=m),
], ids=["specialised", "robust", "sparse"])  # fmt: skip
def test_a_head_inside_names_its_classes(wrap: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, other = tiny("bert", "classification"), tiny("bert", "classification")
    other.load_state_dict(model.state_dict())
    labels = ("a", "b", "c", "d")
    adapter = randomise(dt.attach(model, wrap(dt.Union(methods=(LORA, dt.Tune(labels=labels))))))
    assert adapter.labels == tuple(model.config.id2label.values()) == labels
    adapter.save(tmp_path)
    assert dt.load(other, tmp_path).labels == tuple(other.config.id2label.values()) == labels
    assert torch.equal(other(**inputs(other)).logits, model(**inputs(model)).logits)
    dt.detach(model)
    assert len(model.config.id2label) == 3


@pytest.mark.parametrize("n", [None, 1])
def test_a_fusion_is_pruned_inside(n: int | None) -> None:
    model = deep("llama")
    for i, name in enumerate("abc"):
        dt.attach(model, dt.Pfeiffer(size=2 + i, init=dt.NearIdentity(std=0.3)), name)
    fused = randomise(dt.attach(model, dt.AdapterDrop(inner=dt.AdapterFusion(adapters=("a", "b", "c")), n=n), "fused"))
    given = inputs(model)
    with dt.AdapterFusion.attention(fused) as seen:
        model(**given)
    weights = sum(found[0].mean((0, 1)) for found in seen.values())
    kept = [name for i, name in enumerate("abc") if i != int(torch.as_tensor(weights).argmin())]
    cut = dt.AdapterFusion.prune(fused, 2, seen, "cut")
    got = model(**given).logits
    want = dt.attach(model, dt.AdapterDrop(inner=dt.AdapterFusion(adapters=tuple(kept)), n=n), "want")
    want.load_state_dict({**want.state_dict(), **dict(fused.named_parameters())})
    assert list(cut.method.inner.adapters) == kept
    torch.testing.assert_close(got, model(**given).logits, atol=0, rtol=0)
