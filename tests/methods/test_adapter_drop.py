"""AdapterDrop: nothing below block n, one draw a step, and what is left when a trained adapter is cut."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.callbacks.adapter_drop import Dropping
from deltatune.core import Part, Run, resolve
from deltatune.models.tiny import inputs, tiny

LORA = dt.LoRA(r=2)
INNER = {
    "lora": LORA,
    "fused": dt.LoRA(r=2, targets=Part("q", "v")),
    "pfeiffer": dt.Pfeiffer(size=3),
    "houlsby": dt.Houlsby(size=3),
    "parallel": dt.ParallelAdapter(size=3),
    "compacter": dt.Compacter(size=4),
    "lora + head": dt.Union(methods=(LORA, dt.Tune())),
}


def deep(family: str, n: int = 4) -> nn.Module:
    torch.manual_seed(0)
    names = {
        "gpt2": ["n_layer"],
        "bloom": ["n_layer"],
        "t5": ["num_layers"],
        "bart": ["encoder_layers", "decoder_layers"],
    }
    options = dict.fromkeys(names.get(family, ["num_hidden_layers"]), n) | (
        {"num_decoder_layers": n} if family == "t5" else {}
    )
    return tiny(family, **options)


def randomise(adapter: dt.Adapter, std: float = 0.2) -> dt.Adapter:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return adapter


def entering(model: nn.Module, block: int, given: dict[str, Tensor]) -> list[Tensor]:
    """What enters that block of the encoder and of the decoder."""
    found: list[Tensor] = []
    keep = lambda m, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"])
    blocks = [m.module for m in resolve(model, Part("block")) if m.path.split(".")[-1] == str(block)]
    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in blocks]
    model(**given)
    for handle in handles:
        handle.remove()
    return found


def loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given).logits.float().square().mean()


@pytest.mark.parametrize("family,inner", [
    *(("llama", i) for i in INNER), ("bert", "houlsby"), ("bert", "pfeiffer"), ("gpt2", "fused"), ("bloom", "houlsby"),
    ("t5", "lora"), ("bart", "houlsby"), ("opt", "houlsby"),
])  # fmt: skip
def test_what_enters_block_n_is_the_base_bitwise_and_has_no_gradient(family: str, inner: str) -> None:
    model = deep(family)
    given = inputs(model)
    want = [t.detach() for t in entering(model.requires_grad_(False), 2, given)]
    base = model(**given).logits
    randomise(dt.attach(model, dt.AdapterDrop(inner=INNER[inner], n=2)))
    got = entering(model, 2, given)
    sides = 2 if family in ("t5", "bart") else 1
    assert len(got) == len(want) == sides
    assert torch.equal(got[0], want[0]) and not got[0].requires_grad  # a decoder's blocks look at an adapted encoder
    assert sides == 2 or torch.equal(got[-1], want[-1])
    assert not torch.allclose(model(**given).logits, base)


@pytest.mark.parametrize("n,left", [(0, 4), (1, 3), (3, 1)])
def test_count_and_sites(n: int, left: int) -> None:
    plan = dt.plan(deep("llama"), dt.AdapterDrop(inner=dt.Pfeiffer(size=3), n=n))
    assert [s.path for s in plan.sites] == [f"model.layers.{i}" for i in range(n, 4)]
    assert plan.trained == left * (2 * 32 * 3 + 3 + 32)
    both = dt.plan(deep("bart"), dt.AdapterDrop(inner=dt.Pfeiffer(size=3), n=n))
    assert len(both.sites) == 2 * left  # encoder and decoder


def test_rows_of_a_fused_projection_stay_rows() -> None:
    plan = dt.plan(deep("gpt2"), dt.AdapterDrop(inner=INNER["fused"], n=1))
    assert [s.out for s in plan.sites] == [32] * 6


def test_norms_of_the_embeddings_are_below_and_those_at_the_end_above() -> None:
    norms = {
        f: {s.path for s in dt.plan(deep(f), dt.AdapterDrop(inner=dt.Tune(targets=Part("norm")), n=2)).sites}
        for f in ("bert", "gpt2", "bart", "bloom")
    }
    assert not any("embed" in p for paths in norms.values() for p in paths)
    assert "transformer.ln_f" in norms["gpt2"] and "transformer.h.2.ln_1" in norms["gpt2"]
    assert not any(".1." in p for paths in norms.values() for p in paths)


@pytest.mark.parametrize("inner", INNER)
def test_with_no_block_dropped_it_is_the_ordinary_adapter(inner: str) -> None:
    one, two = deep("llama"), deep("llama")
    torch.manual_seed(1)
    plain = dt.attach(one, INNER[inner])
    torch.manual_seed(1)
    none = dt.attach(two, dt.AdapterDrop(inner=INNER[inner], n=0))
    assert all(torch.equal(t, none.state_dict()[k]) for k, t in plain.state_dict().items())
    assert torch.equal(one(**inputs(one)).logits, two(**inputs(two)).logits)


def test_with_all_blocks_dropped_only_what_is_above_is_left() -> None:
    model = deep("llama")
    with pytest.raises(dt.DeltatuneError, match="n=4 drops every adapter of this model; give less"):
        dt.attach(model, dt.AdapterDrop(inner=LORA, n=4))
    assert all(p.requires_grad for p in model.parameters())
    want = model(**inputs(model)).logits
    adapter = dt.attach(model, dt.AdapterDrop(inner=INNER["lora + head"], n=4))
    assert {path for path, *_ in adapter.sites()} == {"lm_head"}
    assert torch.equal(model(**inputs(model)).logits, want)


def robust(family: str, inner: str) -> tuple[nn.Module, dt.Adapter, Run, Any]:
    model = deep(family).train()
    adapter = randomise(dt.attach(model, dt.AdapterDrop(inner=INNER[inner], seed=3)))
    run = Run(model, adapter, 50)
    (events,) = (c.start(run) for c in adapter.callbacks())
    events.on_train_start(run)
    return model, adapter, run, events


def block_of(name: str) -> int | None:
    return next((int(p) for p in name.split(".") if p.isdigit() and not name.startswith("shared")), None)


@pytest.mark.parametrize(
    "family,inner", [("llama", "lora"), ("bert", "pfeiffer"), ("gpt2", "fused"), ("llama", "compacter")]
)
def test_a_step_trains_the_adapters_of_block_n_and_above_alone(family: str, inner: str) -> None:
    model, adapter, run, events = robust(family, inner)
    given, seen = inputs(model), set()
    while len(seen) < 4:
        (n,) = {min(u.block for u in units if not u.out) for units in [dropping(adapter)]}
        seen.add(n)
        loss(model, given).backward()
        for name, p in adapter.named_parameters():
            if name.startswith("shared"):
                assert p.grad is not None and p.grad.any()
            elif (block := block_of(name)) is not None and "norm" not in name:
                assert (p.grad is not None and bool(p.grad.any())) == (block >= n), (name, n)
                assert (p.grad is None) == (block < n) == (not p.requires_grad)
            p.grad = None
        want = entering(model, n, given)[0]
        dt.activate(model)
        assert torch.equal(want, entering(model, n, given)[0])
        dt.activate(model, adapter.name)
        run.step += 1
        events.on_step_end(run)
        assert run.step < 40
    events.on_train_end(run)
    assert not any(u.out for u in dropping(adapter)) and all(p.requires_grad for p in adapter.parameters())


def dropping(adapter: dt.Adapter) -> list[Dropping]:
    return [m for _, u in adapter.units() for m in u.modules() if isinstance(m, Dropping)]


def test_draws_are_uniform_and_those_of_seed_and_step() -> None:
    (callback,) = dt.AdapterDrop(seed=5).callbacks()
    assert isinstance(callback, dt.DepthDraw)
    draws = [callback.draw(step, 12) for step in range(12_000)]
    count = Counter(draws)
    assert set(count) == set(range(12)) and all(850 < c < 1150 for c in count.values())
    assert draws == [dt.DepthDraw(seed=5).draw(step, 12) for step in range(12_000)]
    assert draws[:50] != [dt.DepthDraw(seed=6).draw(step, 12) for step in range(50)]
    assert not list(dt.AdapterDrop(n=3).callbacks())


def depth(adapter: dt.Adapter) -> int:
    return min((u.block for u in dropping(adapter) if not u.out), default=4)


def test_each_step_has_its_own_draw_whether_resumed_or_not() -> None:
    _, adapter, run, events = robust("llama", "lora")
    draws = [dt.DepthDraw(seed=3).draw(step, 4) for step in range(1, 9)]
    seen = [depth(adapter)]
    while run.step < 7:
        run.step += 1
        events.on_step_end(run)
        seen.append(depth(adapter))
    assert seen == draws and len(set(draws)) > 2
    _, other, later, again = robust("llama", "lora")
    later.step = 5
    again.on_train_start(later)
    assert depth(other) == draws[5]


def test_what_is_frozen_for_another_reason_stays_frozen() -> None:
    model = deep("llama").train()
    adapter = dt.attach(model, dt.AdapterDrop(inner=LORA, seed=3))
    frozen = [p for role, p in adapter.roles() if role == "down"]
    for p in frozen:
        p.requires_grad_(False)
    run = Run(model, adapter, 50)
    (events,) = (c.start(run) for c in adapter.callbacks())
    events.on_train_start(run)
    while run.step < 8:
        run.step += 1
        events.on_step_end(run)
        assert not any(p.requires_grad for p in frozen)
    events.on_train_end(run)
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for role, p in adapter.roles() if role == "up")


@pytest.mark.parametrize("family,table", [("gpt2", "transformer.wte"), ("llama", "model.embed_tokens")])
def test_embeddings_are_below_the_first_block(family: str, table: str) -> None:
    inner = dt.LoRA(r=2, targets=(Part("embedding"), Part("q", "v")))
    sites = {n: {s.path for s in dt.plan(deep(family), dt.AdapterDrop(inner=inner, n=n)).sites} for n in (0, 1)}
    assert table in sites[0] and table not in sites[1]
    model = deep(family)
    adapter = dt.attach(model, dt.AdapterDrop(inner=inner))
    assert {u.block for path, _, unit, _ in adapter.sites() for u in unit.modules() if isinstance(u, Dropping)
            if path == table} == {0}  # fmt: skip


def test_a_dropped_delta_leaves_the_weight_to_a_delta_around_it() -> None:
    model, adapter, _, _ = robust("llama", "lora")
    randomise(dt.attach(model, dt.DoRA(inner=LORA), "around"))
    model.train()
    given = inputs(model)
    want = model(**given).logits
    for u in dropping(adapter):
        u.out = True
        w = torch.randn(u.inner.b.shape[0], u.inner.a.shape[1])
        assert torch.equal(u.weight(w), w) and u.factors() is None  # type: ignore[attr-defined]
    dt.activate(model, adapter.name, "around")
    torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-4)


def test_evaluation_has_all_adapters() -> None:
    model, adapter, run, events = robust("llama", "lora")
    given = inputs(model)
    while not any(u.out for u in dropping(adapter)):
        run.step += 1
        events.on_step_end(run)
    out = model(**given).logits
    whole = model.eval()(**given).logits
    assert not torch.allclose(out, whole)
    for u in dropping(adapter):
        u.out = False
    assert torch.equal(model.train()(**given).logits, whole)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model, adapter, run, events = robust("llama", "pfeiffer")
    given, grads = inputs(model), []
    while not any(u.out for u in dropping(adapter)):
        run.step += 1
        events.on_step_end(run)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss(model, given).backward()
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None})
        for p in adapter.parameters():
            p.grad = None
    assert grads[0].keys() == grads[1].keys() and 0 < len(grads[0]) < len(list(adapter.parameters()))
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n])


@pytest.mark.parametrize("family,inner", [*(("llama", i) for i in INNER), ("gpt2", "fused"), ("t5", "pfeiffer")])
def test_a_trained_adapter_is_cut(family: str, inner: str) -> None:
    """What it does with its lowest blocks left out is what the cut one does, whose tensors are its own."""
    model, adapter, _, _ = robust(family, inner)
    given = inputs(model)
    for u in dropping(adapter):
        u.out = u.block < 2
    want = model(**given).logits
    for u in dropping(adapter):
        u.out = False
    model.eval()
    cut = dt.AdapterDrop.drop(adapter, 2, "cut")
    assert cut.method == dt.AdapterDrop(inner=INNER[inner], n=2, seed=3)
    assert not dropping(cut) and not set(map(id, cut.parameters())) & set(map(id, adapter.parameters()))
    assert all(block_of(path) is None or block_of(path) >= 2 for path, *_ in cut.sites())
    torch.testing.assert_close(model(**given).logits, want)
    more = dt.AdapterDrop.drop(cut, 3, "more")
    assert sum(p.numel() for p in more.parameters()) < sum(p.numel() for p in cut.parameters())
    with pytest.raises(dt.DeltatuneError, match="below 1 cannot be dropped"):
        dt.AdapterDrop.drop(cut, 1, "less")


def test_only_what_is_adapter_drop_can_be_cut() -> None:
    adapter = dt.attach(deep("llama"), LORA)
    with pytest.raises(dt.DeltatuneError, match="cannot be dropped"):
        dt.AdapterDrop.drop(adapter, 1, "cut")


def test_tasks_share_the_trunk_below_block_n() -> None:
    model = deep("llama")
    given, alone = inputs(model, batch=3), {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        adapter = randomise(dt.attach(model, dt.AdapterDrop(inner=dt.Pfeiffer(size=2 + seed), n=2), name))
        alone[name] = model(**given).logits
    dt.activate(model, router=dt.PerRow(["two", "one", "two"]))
    mixed = model(**given).logits
    trunk = entering(model, 2, given)[0]
    want = torch.stack([alone[n][i] for i, n in enumerate(["two", "one", "two"])])
    torch.testing.assert_close(mixed, want, atol=1e-5, rtol=1e-4)
    dt.activate(model)
    assert torch.equal(trunk, entering(model, 2, given)[0]) and adapter.name == "two"


def test_robust_adapters_in_rows_of_one_batch() -> None:
    model = deep("bloom")
    given, alone = inputs(model, batch=2), []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        randomise(dt.attach(model, dt.AdapterDrop(inner=dt.Pfeiffer(size=2)), name))
        alone.append(model(**given).logits)
    dt.activate(model, router=dt.PerRow(["two", "one"]))
    torch.testing.assert_close(model(**given).logits, torch.stack([alone[1][0], alone[0][1]]), atol=1e-5, rtol=1e-4)


def test_rows_in_a_step_that_drops_some_of_their_adapters() -> None:
    """Bloom's blocks are given ALiBi for all rows and heads at once, so rows cannot be run apart."""
    model = deep("bloom").train()
    given, alone, names = inputs(model, batch=3), {}, ("one", "two", "one")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        adapter = randomise(dt.attach(model, dt.AdapterDrop(inner=dt.Pfeiffer(size=2)), name))
        for unit in dropping(adapter):
            unit.out = unit.block < 1 + 2 * seed
        alone[name] = model(**given).logits
    dt.activate(model, router=dt.PerRow(names))
    want = torch.stack([alone[n][i] for i, n in enumerate(names)])
    torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-4)


def test_saves_copies_and_merges(tmp_path: Any) -> None:
    model, adapter, _, _ = robust("llama", "lora")
    given = inputs(model)
    want = model.eval()(**given).logits
    adapter.save(tmp_path)
    other = deep("llama")
    assert dt.load(other, tmp_path).method == adapter.method and torch.equal(other(**given).logits, want)
    assert torch.equal(copy.deepcopy(model)(**given).logits, want)
    dt.merge(model)
    torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-4)


def test_what_is_refused() -> None:
    with pytest.raises(dt.DeltatuneError, match="n must be at least 0, got -1; None draws it"):
        dt.AdapterDrop(n=-1)
    with pytest.raises(dt.DeltatuneError, match="give them to inner"):
        dt.AdapterDrop(targets="q_proj")
    with pytest.raises(dt.DeltatuneError, match="holds blocks; inner must act inside of them"):
        dt.attach(deep("llama"), dt.AdapterDrop(inner=dt.PromptTuning(length=2)))
    with pytest.raises(dt.DeltatuneError, match="nothing in training can be dropped"):
        model = deep("llama")
        dt.DepthDraw().start(Run(model, dt.attach(model, LORA), 3))
