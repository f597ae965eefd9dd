"""AdaMix: what is drawn, the mean in evaluation, the consistency loss, and what it collapses to."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_of import documents, run_on_llama
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltatune as dt
from deltatune.callbacks.consistency import Consistency, divergence
from deltatune.core import Run
from deltatune.data import Batches, padded
from deltatune.models.tiny import inputs, tiny
from deltatune.train import TrainOptions, fit, loss
from deltatune.train.loss import outcome
from deltatune.train.memory import Shape, estimate

DRAWN = dt.NearIdentity(std=0.3)


def houlsby(size: int = 3) -> dt.Houlsby:
    return dt.Houlsby(size=size, norms=None, init=DRAWN)


def shake(adapter: dt.Adapter, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * std)


def linear(**options: Any) -> tuple[nn.Linear, dt.Adapter, Any]:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).double().train()
    adapter = dt.attach(model, dt.AdaMix(**{"expert": houlsby(), "targets": nn.Linear} | options))
    return model, adapter, next(u for _, u in adapter.units())


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bottleneck(u: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return u + gelu_tanh(u @ down.T + down_bias) @ up.T + up_bias


@pytest.mark.parametrize(("sharing", "kinds"), [("up", 3), ("down", 3), ("none", 9)])
def test_each_pass_draws_a_pair_for_the_whole_batch_uniformly(sharing: str, kinds: int) -> None:
    model, adapter, unit = linear(n=3, sharing=sharing)
    shake(adapter)
    x = torch.randn(4, 6, dtype=torch.double)
    u = x @ model.weight.T + model.bias
    down = [(unit.down, unit.down_bias)] if sharing == "down" else list(zip(unit.down, unit.down_bias, strict=True))
    up = [(unit.up, unit.up_bias)] if sharing == "up" else list(zip(unit.up, unit.up_bias, strict=True))
    want = {(i, j): bottleneck(u, *down[j], *up[i]) for i, j in itertools.product(range(len(up)), range(len(down)))}
    assert len(want) == kinds
    drawn: Counter[tuple[int, int]] = Counter()
    for _ in range(passes := 60 * kinds):
        y = model(x)
        (which,) = [pair for pair, one in want.items() if torch.allclose(y, one, atol=1e-12)]
        drawn[which] += 1
    assert len(drawn) == kinds and sum(drawn.values()) == passes
    assert all(30 < count < 95 for count in drawn.values())  # 60 expected, deviation below 8


def test_sites_draw_independently() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double().train()
    adapter = dt.attach(model, dt.AdaMix(expert=houlsby(), n=2, targets=nn.Linear))
    shake(adapter)
    x, pairs = torch.randn(2, 6, dtype=torch.double), Counter[tuple[float, ...]]()
    for _ in range(200):
        pairs[tuple(model(x)[0].detach().mul(1e6).round().tolist())] += 1
    assert len(pairs) == 4 and all(25 < count < 80 for count in pairs.values())  # 50 expected


def test_evaluation_averages_weights_and_biases() -> None:
    model, adapter, unit = linear(n=3, sharing="none")
    shake(adapter)
    model.eval()
    x = torch.randn(4, 6, dtype=torch.double)
    u = x @ model.weight.T + model.bias
    mean = [sum(p[i] for i in range(3)) / 3 for p in (unit.down, unit.down_bias, unit.up, unit.up_bias)]
    torch.testing.assert_close(model(x), bottleneck(u, *mean), atol=1e-12, rtol=0)
    assert torch.equal(model(x), model(x))
    outputs = [bottleneck(u, unit.down[j], unit.down_bias[j], unit.up[i], unit.up_bias[i])
               for i in range(3) for j in range(3)]  # fmt: skip
    assert not torch.allclose(sum(outputs) / 9, model(x), atol=1e-3)  # gelu is between


@pytest.mark.parametrize("sharing", ["up", "none"])
def test_averaged_weights_are_averaged_outputs_where_nothing_is_between(sharing: str) -> None:
    """LoRA's factors, over all pairs of draws."""
    model, adapter, unit = linear(expert=dt.LoRA(r=2, alpha=6), n=3, sharing=sharing)
    shake(adapter)
    x = torch.randn(4, 6, dtype=torch.double)
    base = x @ model.weight.T + model.bias
    ups = [unit.up] if sharing == "up" else list(unit.up)
    outputs = [base + 3.0 * (x @ down.T) @ up.T for up in ups for down in unit.down]
    y = model(x)
    assert sum(torch.allclose(y, one, atol=1e-12) for one in outputs) == 1
    model.eval()
    torch.testing.assert_close(model(x), sum(outputs) / len(outputs), atol=1e-12, rtol=0)
    dt.merge(model)
    torch.testing.assert_close(model(x), sum(outputs) / len(outputs), atol=1e-12, rtol=0)


@pytest.mark.parametrize("expert", [dt.Houlsby(size=8, norms=None, init=DRAWN), dt.LoRA(r=4)])
def test_at_the_start_every_draw_is_the_mean_and_the_expert_bit_for_bit(expert: dt.core.Method) -> None:
    torch.manual_seed(0)
    model = tiny("llama").train()
    adapter = dt.attach(model, dt.AdaMix(expert=expert, sharing="none"), "mix")
    if isinstance(expert, dt.LoRA):  # B too, alike in all copies
        with torch.no_grad():
            for _, unit in adapter.units():
                unit.up.copy_(torch.randn(unit.up.shape[1:]))
    batch = inputs(model)
    first = model(**batch).logits
    assert all(torch.equal(model(**batch).logits, first) for _ in range(4))
    assert torch.equal(model.eval()(**batch).logits, first)
    dt.AdaMix.collapse(adapter, "one")
    assert torch.equal(model(**batch).logits, first)
    dt.activate(model)
    assert not torch.equal(model(**batch).logits, first)


def test_training_draws_anew_and_evaluation_does_not() -> None:
    torch.manual_seed(0)
    model = tiny("llama").train()
    batch = inputs(model)
    shake(dt.attach(model, dt.AdaMix()), 0.1)
    assert len({model(**batch).logits.sum().item() for _ in range(8)}) > 4
    torch.manual_seed(3)
    one = model(**batch).logits
    torch.manual_seed(3)
    assert torch.equal(model(**batch).logits, one)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_one_copy_is_a_plain_adapter() -> None:
    model, adapter, unit = linear(n=1)
    shake(adapter)
    x = torch.randn(4, 6, dtype=torch.double)
    u = x @ model.weight.T + model.bias
    want = bottleneck(u, unit.down[0], unit.down_bias[0], unit.up, unit.up_bias)
    torch.testing.assert_close(model(x), want, atol=1e-12, rtol=0)


def test_parameter_counts() -> None:
    """Per block E (d m + m) + (d m + d) in training, 2 d m + m + d once collapsed."""
    d, m, n, blocks = 32, 5, 4, 2
    model = tiny("llama")
    method = dt.AdaMix(expert=dt.Houlsby(size=m, norms=None), n=n)
    assert dt.plan(model, method).trained == blocks * (n * (d * m + m) + d * m + d)
    one = dt.AdaMix.collapse(dt.attach(model, method), "one")
    assert sum(p.numel() for p in one.parameters()) == blocks * (2 * d * m + m + d)
    assert [path.rpartition(".")[2] for path, *_ in one.sites()] == ["down_proj"] * blocks
    lora = dt.attach(model, dt.AdaMix(expert=dt.LoRA(r=3), n=n), "lora")
    assert {path.rpartition(".")[2] for path, *_ in lora.sites()} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
@pytest.mark.parametrize("expert", [dt.Houlsby(size=8, norms=None), dt.LoRA(r=4, alpha=3)])
def test_collapses_to_an_ordinary_adapter_beside_a_head(expert: Any, family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    adapter = dt.attach(model, dt.Union(methods=(dt.AdaMix(expert=expert), dt.Tune())), "mix")
    shake(adapter, 0.1)
    batch = inputs(model)
    want = model(**batch).logits
    one = dt.AdaMix.collapse(adapter, "one")
    kinds = [type(m) for m in one.method.methods]
    assert kinds == [type(expert), dt.Tune] and one.method.methods[0].targets is not None
    torch.testing.assert_close(model(**batch).logits, want, atol=1e-6, rtol=1e-6)
    one.save(tmp_path)
    dt.detach(model)
    dt.load(model, tmp_path)  # PEFT's layout puts the slices of a fused projection into one product
    torch.testing.assert_close(model(**batch).logits, want, atol=4e-6, rtol=1e-6)
    with pytest.raises(dt.DeltatuneError, match="is a Union, without copies"):
        dt.AdaMix.collapse(dt.adapters(model)["one"], "again")


def test_divergence_against_a_loop_and_its_gradient() -> None:
    torch.manual_seed(0)
    one, two = (torch.randn(3, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    want = 0.0
    for a, b in zip(one.detach(), two.detach(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a.tolist(), b.tolist()))
        want += sum(s * math.log(s / t) + t * math.log(t / s) for s, t in zip(p, q, strict=True)) / 2 / 3
    got = divergence(one, two)
    assert got.item() == pytest.approx(want, abs=1e-12)
    got.backward()
    gap = (one.softmax(-1) - two.softmax(-1)).detach() / 2 / 3  # targets have no gradient
    torch.testing.assert_close(one.grad, gap)
    torch.testing.assert_close(two.grad, -gap)
    assert divergence(one, one).item() == 0 and divergence(one[:0], two[:0]).item() == 0


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_two_passes_have_the_loss_of_the_first(family: str) -> None:
    torch.manual_seed(0)
    task: Any = {"llama": "causal", "t5": "seq2seq", "bert": "tagging"}[family]
    model = tiny(family, "tokens") if family == "bert" else tiny(family)
    shake(dt.attach(model, dt.AdaMix()), 0.2)
    model.train()
    examples = documents(3)
    if task == "tagging":
        examples = [type(e)(e.input_ids, [t if t == -100 else t % 2 for t in e.labels]) for e in examples]
    batch = padded(examples, pad=0, task=task)
    torch.manual_seed(5)
    one = outcome(model, batch, task)
    torch.manual_seed(5)
    both = outcome(model, batch, task, passes=2)
    assert not one.logits and len(both.logits) == 2 and both.targets == one.targets
    assert both.total.item() == pytest.approx(one.total.item(), rel=1e-5) and both.correct == one.correct
    assert both.logits[0].shape[0] == one.targets and not torch.allclose(*both.logits)


def step_losses(weight: float, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """(share, what the callback adds) of each micro-batch of one step over the same documents."""
    found = []
    real = Consistency(weight=weight).start(Run(nn.Linear(1, 1), None, 1))

    class Spy(dt.core.Events):
        def on_loss(self, run: Run, value: Tensor) -> Tensor:
            new = real.on_loss(run, value)
            one, two = run.logits
            assert not torch.equal(one, two)
            found.append((run.share, (new - value).item(), divergence(one, two).item()))
            return new

    monkeypatch.setattr(Consistency, "start", lambda self, run: Spy())
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = dt.attach(model, dt.AdaMix(consistency=weight, sharing="none"))
    shake(adapter, 0.2)
    options = TrainOptions(max_steps=1, lr=1e-3, batch_size=8, tokens_per_batch=None, precision="fp32")
    fit(model, adapter, Batches(documents(8), batch_size=batch_size), options=options)
    return found


def test_the_loop_runs_two_passes_and_adds_the_term(monkeypatch: pytest.MonkeyPatch) -> None:
    found = step_losses(100.0, 4, monkeypatch)
    assert len(found) == 2 and sum(share for share, *_ in found) == pytest.approx(1)
    for share, added, gap in found:
        assert gap > 1e-4 and added == pytest.approx(100 * share * gap, rel=1e-4)


def test_without_consistency_there_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dt.AdaMix().callbacks() == [Consistency(weight=1.0)] and not dt.AdaMix(consistency=0.0).callbacks()
    seen = []
    monkeypatch.setattr(loss, "_logits", lambda *a: seen.append(a))
    model = tiny("llama")
    adapter = dt.attach(model, dt.AdaMix(consistency=0.0))
    fit(model, adapter, Batches(documents(8), batch_size=4), options=TrainOptions(max_steps=1, batch_size=4))
    assert not seen
    (events,) = [c.start(Run(model, adapter, 1)) for c in dt.AdaMix().callbacks()]
    with pytest.raises(dt.DeltatuneError, match="compares two forward passes"):
        events.on_loss(Run(model, adapter, 1), torch.zeros(()))


def test_a_run_repeats_its_draws_after_a_break(tmp_path: Path) -> None:
    run_on_llama(dt.AdaMix(), tmp_path, stop=3, steps=6)


@pytest.mark.parametrize("expert", [dt.Houlsby(size=8, norms=None), dt.LoRA(r=4)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_draw_the_same(expert: Any, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny("llama").train()
        adapter = dt.attach(model, dt.AdaMix(expert=expert, sharing="none"))
        shake(adapter, 0.2)
        batch = inputs(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in adapter.named_parameters()})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n])
        rows = (g != 0).flatten(1).any(1)
        assert int(rows.sum()) == 1, n  # one copy learns in a step


def test_compiles_without_graph_breaks_and_still_draws() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).train()
    shake(dt.attach(model, dt.AdaMix(expert=houlsby(), targets=nn.Linear)))
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    assert len({fast(x).sum().item() for _ in range(12)}) > 4
    model.eval()
    torch.testing.assert_close(fast(x), model(x))


def test_options_are_checked() -> None:
    for wrong, told in (
        ({"expert": dt.IA3()}, "expert is a Houlsby or a LoRA, got IA3"),
        ({"expert": dt.Houlsby()}, "norms=None"),
        ({"expert": dt.LoRA(init=dt.PiSSA())}, "give the expert no init"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"sharing": "both"}, "sharing is 'up', 'down' or 'none', got 'both'"),
        ({"consistency": -1.0}, "weight must not be negative, got -1.0"),
    ):
        with pytest.raises(dt.DeltatuneError, match=told):
            dt.AdaMix(**wrong)
    model = tiny("llama")
    with pytest.raises(dt.DeltatuneError, match="is a LoRA, without copies"):
        dt.AdaMix.collapse(dt.attach(model, dt.LoRA(r=2)), "one")


def test_the_memory_estimate_has_both_passes() -> None:
    found = []
    for weight in (0.0, 1.0):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=128,
                                                 num_hidden_layers=4, num_attention_heads=4))  # fmt: skip
        found.append(estimate(model, dt.AdaMix(consistency=weight), Shape(4, 64, 200), TrainOptions(batch_size=4),
                              dtype=torch.float32, device=torch.device("cpu")))  # fmt: skip
    assert 1.7 < found[1].activations / found[0].activations < 3
