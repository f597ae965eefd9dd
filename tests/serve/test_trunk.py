"""Several adapters on the same inputs, against each of them alone; and how often each block runs for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread, get_ident
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.core import DeltatuneError, Part, resolve, using
from deltatune.models.tiny import inputs, tiny
from deltatune.serve import under_each

DEPTH = {"gpt2": ["n_layer"], "bloom": ["n_layer"], "t5": ["num_layers", "num_decoder_layers"],
         "bart": ["encoder_layers", "decoder_layers"]}  # fmt: skip
BLOCKS = 4


def deep(family: str, task: str = "classification") -> Any:
    torch.manual_seed(0)
    return tiny(family, task, **dict.fromkeys(DEPTH.get(family, ["num_hidden_layers"]), BLOCKS)).eval()


def attached(model: Any, **methods: dt.methods.Method) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, method in methods.items():
        adapter = dt.attach(model, method, name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.eval()
    dt.activate(model)


@contextmanager
def counted(model: Any) -> Iterator[Counter[int]]:
    """Calls of attention in each block: a block that is left out calls none."""
    found: Counter[int] = Counter()
    handles = []
    for match in resolve(model, Part("attention")):
        block = next(int(p) for p in match.path.split(".") if p.isdigit())
        handles.append(match.module.register_forward_pre_hook(lambda m, a, block=block: found.update([block])))
    yield found
    for handle in handles:
        handle.remove()


def from_block(n: int, method: Any) -> Any:
    return dt.AdapterDrop(inner=method, n=n)


@pytest.mark.parametrize("method", [dt.LoRA(r=2), dt.Pfeiffer(size=3), dt.ParallelAdapter(size=3)], ids=repr)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "bloom"])
def test_each_answers_as_alone_and_what_is_below_all_runs_once(family: str, method: Any) -> None:
    model = deep(family)
    attached(model, a=from_block(2, method), b=from_block(3, method), c=from_block(2, dt.IA3()))
    given = inputs(model, batch=3)
    with counted(model) as calls:
        found = under_each(model, ["a", "b", "c"], **given)
    assert calls == {0: 1, 1: 1, 2: 3, 3: 3}
    for name, output in found.items():
        with using(model, name), torch.no_grad():
            alone = model(**given)
        torch.testing.assert_close(output.logits, alone.logits, rtol=0, atol=0)
        assert not torch.equal(output.logits, model(**given).logits)
    with counted(model) as calls:
        model(**given)
    assert calls == dict.fromkeys(range(BLOCKS), 1)


def test_heads_of_different_sizes_share_the_whole_base() -> None:
    model = deep("bert")
    attached(model, two=dt.Tune(labels=("x", "y")), three=dt.Tune(labels=("x", "y", "z")))
    given = inputs(model)
    with counted(model) as calls:
        found = under_each(model, ["two", "three"], **given)
    assert calls == dict.fromkeys(range(BLOCKS), 1)
    assert [o.logits.shape[-1] for o in found.values()] == [2, 3]
    for name, output in found.items():
        with using(model, name), torch.no_grad():
            torch.testing.assert_close(output.logits, model(**given).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_of_an_encoder_decoder_only_the_encoder_is_shared(family: str) -> None:
    model = deep(family, "lm")
    decoder = r".*decoder\.(block|layers)\.\d+\..*(DenseReluDense\.wo|fc2)"
    attached(model, a=dt.LoRA(r=2, targets=decoder), b=dt.IA3(targets=decoder))
    given = inputs(model)
    calls: Counter[int] = Counter()
    for match in resolve(model, Part("attention")):
        if ".encoder." in f".{match.path}":
            match.module.register_forward_pre_hook(lambda m, a: calls.update([0]))
    found = under_each(model, ["a", "b"], **given)
    assert calls == {0: BLOCKS}
    for name, output in found.items():
        with using(model, name), torch.no_grad():
            torch.testing.assert_close(output.logits, model(**given).logits, rtol=0, atol=0)


def test_an_adapter_at_the_embedding_leaves_nothing_to_share() -> None:
    model = deep("llama")
    attached(model, a=dt.LoRA(r=2, targets=Part("embedding")), b=from_block(3, dt.LoRA(r=2)))
    given = inputs(model)
    with counted(model) as calls:
        found = under_each(model, ["b", "a"], **given)
    assert calls == dict.fromkeys(range(BLOCKS), 2)
    with using(model, "a"), torch.no_grad():
        torch.testing.assert_close(found["a"].logits, model(**given).logits, rtol=0, atol=0)


def test_another_thread_sees_the_whole_model_meanwhile() -> None:
    model = deep("bert")
    attached(model, a=from_block(3, dt.LoRA(r=2)), b=from_block(3, dt.LoRA(r=2)))
    dt.activate(model)
    given, others = inputs(model), inputs(model, seed=5)
    with torch.no_grad():
        want = model(**others).logits
    seen, me = list[torch.Tensor](), get_ident()

    def elsewhere() -> None:
        with torch.no_grad():
            seen.append(model(**others).logits)

    def beside(*_: Any) -> None:
        if get_ident() == me:
            (thread := Thread(target=elsewhere)).start()
            thread.join()

    handle = model.get_input_embeddings().register_forward_pre_hook(beside)
    found = under_each(model, ["a", "b"], **given)
    handle.remove()
    assert len(seen) == 2
    for logits in seen:
        torch.testing.assert_close(logits, want, rtol=0, atol=0)
    for name, output in found.items():
        with using(model, name), torch.no_grad():
            torch.testing.assert_close(output.logits, model(**given).logits, rtol=0, atol=0)


def test_a_layer_that_is_several_blocks_runs_as_often_as_it_must() -> None:
    model = deep("llama")
    model.model.layers[1] = model.model.layers[0]
    attached(model, a=from_block(3, dt.LoRA(r=2)), b=from_block(3, dt.IA3()))
    given = inputs(model)
    found = under_each(model, ["a", "b"], **given)
    for name, output in found.items():
        with using(model, name), torch.no_grad():
            torch.testing.assert_close(output.logits, model(**given).logits, rtol=0, atol=0)


def test_what_it_refuses() -> None:
    model = deep("llama", "lm")
    attached(model, a=from_block(3, dt.LoRA(r=2)), b=from_block(3, dt.LoRA(r=2)))
    given = inputs(model)
    cached = under_each(model, ["a", "b"], **given, use_cache=True)
    assert all(output.past_key_values is None for output in cached.values())
    with pytest.raises(DeltatuneError, match="no adapter 'c'; attached: a, b"):
        under_each(model, ["a", "c"], **given)
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
    with pytest.raises(DeltatuneError, match="past_key_values"):
        under_each(model, ["a", "b"], input_ids=given["input_ids"][:, :1], past_key_values=cache)
    model.train()
    with pytest.raises(DeltatuneError, match="training mode"):
        under_each(model, ["a", "b"], **given)
