"""Parallel adapters: which tensor they read, where they add, and that they enlarge the feed-forward layer."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.parallel import Bottleneck
from deltatune.models.tiny import inputs, tiny


def randomise(adapter: dt.Adapter, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * std)


@contextmanager
def seen(module: nn.Module, of: str = "input") -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    keep = lambda m, args, out: found.append((args[0] if of == "input" else out).clone())  # Falcon adds in place
    handle = module.register_forward_hook(keep)
    yield found
    handle.remove()


# family: in the first block, what reads the stream (code), what reads the MLP's input (text), the down projection
READS = {
    "llama": ("model.layers.0.post_attention_layernorm", "model.layers.0.mlp", "model.layers.0.mlp.down_proj"),
    "gemma2": ("model.layers.0.pre_feedforward_layernorm", "model.layers.0.mlp", "model.layers.0.mlp.down_proj"),
    "gpt2": ("transformer.h.0.ln_2", "transformer.h.0.mlp", "transformer.h.0.mlp.c_proj"),
    "gpt_neox": tuple(f"gpt_neox.layers.0.{n}" for n in ("post_attention_layernorm", "mlp", "mlp.dense_4h_to_h")),
    "bloom": ("transformer.h.0.post_attention_layernorm", "transformer.h.0.mlp", "transformer.h.0.mlp.dense_4h_to_h"),
    "falcon": ("transformer.h.0.input_layernorm", "transformer.h.0.mlp", "transformer.h.0.mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers.0.final_layer_norm", "model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
    "bert": ("bert.encoder.layer.0.intermediate",) * 2 + ("bert.encoder.layer.0.output.dense",),
    "bart": ("model.encoder.layers.0.fc1",) * 2 + ("model.encoder.layers.0.fc2",),
    "distilbert": ("distilbert.transformer.layer.0.ffn",) * 2 + ("distilbert.transformer.layer.0.ffn.lin2",),
    "t5": tuple(f"encoder.block.0.layer.1.{n}" for n in ("layer_norm", "DenseReluDense", "DenseReluDense.wo")),
}  # fmt: skip


@pytest.mark.parametrize("source", ["code", "text"])
@pytest.mark.parametrize("family", READS)
def test_what_is_read_and_where_it_is_added(family: str, source: str) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    stream, text, down = READS[family]
    part = dt.Part("up") if family in ("opt", "bert", "bart") else dt.Part("mlp")
    adapter = dt.attach(model, dt.ParallelAdapter(size=3, scale=2.5, input=None if source == "code" else part))
    randomise(adapter, 0.3)
    unit = next(u for path, _, u, _ in adapter.sites() if path == down and isinstance(u, Bottleneck))
    project = model.get_submodule(down)
    reader = model.get_submodule(stream if source == "code" else text)
    with seen(reader) as x, seen(project) as h, seen(project, "output") as y:
        model(**inputs(model))
    dt.activate(model)
    with torch.no_grad():
        core = F.relu(x[0].double() @ unit.down.double().T + unit.down_bias.double()) @ unit.up.double().T
        want = project(h[0]).double() + 2.5 * (core + unit.up_bias.double())
    torch.testing.assert_close(y[0].double(), want, atol=1e-5, rtol=1e-5)
    assert (y[0] - project(h[0])).abs().max() > 1e-2


def test_opt_with_norms_after_the_sublayers_reads_the_mlp_input() -> None:
    a, b = (dt.plan(tiny("opt", do_layer_norm_before=first), dt.ParallelAdapter(size=2)) for first in (True, False))
    assert any(s.path.endswith("final_layer_norm") for s in a.sites)
    assert {s.path.rpartition(".")[2] for s in b.sites} == {"fc1", "fc2"}


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "distilbert", "bart"])
def test_with_norms_after_the_sums_the_mlp_reads_the_stream(family: str) -> None:
    sites = {s.path.rpartition(".")[2] for s in dt.plan(tiny(family), dt.ParallelAdapter(size=2)).sites}
    assert sites == {"bart": {"fc1", "fc2"}, "distilbert": {"lin1", "lin2"}}.get(family, {"dense"})


def test_is_a_wider_feed_forward_layer() -> None:
    """With T5's relu, reading what the MLP reads: [W1; W_down] and [W2 | s W_up]."""
    torch.manual_seed(0)
    model = tiny("t5").double()
    wide, batch, s = copy.deepcopy(model), inputs(model), 3.0
    adapter = dt.attach(model, dt.ParallelAdapter(size=4, scale=s, input=dt.Part("mlp")))
    randomise(adapter)
    for path, _, unit, _ in adapter.sites():
        if isinstance(unit, Bottleneck):
            with torch.no_grad():
                unit.down_bias.zero_()  # T5's own layers have none
                unit.up_bias.zero_()
                mlp = wide.get_submodule(path.rpartition(".")[0])
                mlp.wi.weight = nn.Parameter(torch.cat([mlp.wi.weight, unit.down]))
                mlp.wo.weight = nn.Parameter(torch.cat([mlp.wo.weight, s * unit.up], 1))
    torch.testing.assert_close(model(**batch).logits, wide(**batch).logits, atol=1e-11, rtol=1e-11)


def test_starts_at_the_base_bitwise_and_counts() -> None:
    model = tiny("llama")
    batch = inputs(model)
    want = model(**batch).logits
    adapter = dt.attach(model, dt.ParallelAdapter(size=5))
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (2 * 32 * 5 + 5 + 32)
    assert torch.equal(model(**batch).logits, want)


def test_scale_is_linear_in_the_up_projection_and_can_be_learned() -> None:
    outs = []
    for scale in (2.0, 4.0, "learned"):
        torch.manual_seed(0)
        model = tiny("gpt2")
        adapter = dt.attach(model, dt.ParallelAdapter(size=4, scale=scale))
        generator = torch.Generator().manual_seed(2)
        for _, unit in adapter.units():
            if isinstance(unit, Bottleneck):
                with torch.no_grad():
                    factor = {2.0: 2, 4.0: 1, "learned": 2}[scale]
                    unit.up.copy_(torch.randn(unit.up.shape, generator=generator) * factor)
                    unit.down.copy_(torch.randn(unit.down.shape, generator=generator))
                    if scale == "learned":
                        unit.s.fill_(2.0)
        outs.append(model(**inputs(model)).logits)
    torch.testing.assert_close(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    outs[2].sum().backward()
    assert all(p.grad is not None and p.grad.abs() > 0 for role, p in adapter.roles() if role == "scale")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def plain() -> tuple[Plain, dt.Adapter]:
    torch.manual_seed(0)
    model = Plain()
    adapter = dt.attach(model, dt.ParallelAdapter(size=3, targets="down", input="norm"))
    randomise(adapter, 0.5)
    return model, adapter


def test_an_unknown_model_needs_the_input_named() -> None:
    with pytest.raises(dt.DeltatuneError, match="name the modules whose input it reads"):
        dt.attach(Plain(), dt.ParallelAdapter(targets="down"))
    with pytest.raises(dt.DeltatuneError, match="scale='learnt'"):
        dt.ParallelAdapter(scale="learnt")  # type: ignore[arg-type]


def test_an_input_that_comes_too_late_is_refused() -> None:
    model = Plain()
    model.late = nn.Identity()
    dt.attach(model, dt.ParallelAdapter(targets="down", input="late"))
    with pytest.raises(dt.DeltatuneError, match="no module of `input` ran before"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("family,site", [
    ("bert", "bert.encoder.layer.0.attention.output.dense"), ("bart", "model.encoder.layers.0.self_attn.out_proj"),
])  # fmt: skip
def test_where_the_mlp_reads_the_stream_attention_has_not_come_to_it(family: str, site: str) -> None:
    model = tiny(family)
    types = [type(m) for m in model.modules()]
    for targets in (dt.Part("o"), dt.Part("o", "down")):
        with pytest.raises(dt.DeltatuneError, match=rf"ParallelAdapter: '{site}' .*; name the modules .*: input=…"):
            dt.attach(model, dt.ParallelAdapter(size=2, targets=targets))
    assert [type(m) for m in model.modules()] == types
    want = model(**inputs(model)).logits
    randomise(dt.attach(model, dt.ParallelAdapter(size=2, targets=dt.Part("o"), input=dt.Part("q"))))
    assert (model(**inputs(model)).logits - want).abs().max() > 1e-2


def test_compiles_without_graph_breaks() -> None:
    model, _ = plain()
    x = torch.randn(5, 4)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


def test_threads_do_not_mix() -> None:
    model, _ = plain()
    xs = [torch.randn(3, 4) for _ in range(2)]
    want = [model(x).detach() for x in xs]
    both = threading.Barrier(2)
    model.up.register_forward_hook(lambda *_: (both.wait(), None)[1])  # after both have read, before either adds
    got: list[Tensor] = [torch.empty(0)] * 2

    def call(i: int) -> None:
        got[i] = model(xs[i]).detach()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_rows_name_their_adapters() -> None:
    model, _ = plain()
    other = dt.attach(model, dt.ParallelAdapter(size=2, targets="down", input="norm"), "other")
    randomise(other, 0.7)
    x, want = torch.randn(3, 4), []
    for name in ("default", "other"):
        dt.activate(model, name)
        want.append(model(x))
    dt.activate(model)
    want.append(model(x))
    dt.activate(model, router=dt.PerRow(["other", None, "default"]))
    torch.testing.assert_close(model(x), torch.stack([want[1][0], want[2][1], want[0][2]]))


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = tiny("llama").train()
    batch = inputs(model)
    adapter = dt.attach(model, dt.ParallelAdapter(size=4))
    randomise(adapter)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
        model.zero_grad()
        for p in adapter.parameters():
            p.grad = None
    assert len(grads[0]) == len(list(adapter.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_copies_after_an_interrupted_call() -> None:
    model, _ = plain()
    x = torch.randn(3, 4, requires_grad=True) * 2  # a tensor of a graph, which cannot be copied
    want = model(x)
    handle = model.up.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
