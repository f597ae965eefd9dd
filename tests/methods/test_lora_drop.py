"""LoRA-drop: the importance of sites, the choice, what is shared and how it is trained, kept and resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.callbacks.lora_drop import OutputEvaluation
from deltatune.core import Run
from deltatune.data import Batches, Example
from deltatune.models.tiny import inputs, tiny
from deltatune.train import TrainOptions, fit

QV = dt.Part("q", "v")


def data(batch_size: int = 4) -> Batches:
    rows = [Example([3 + i % 7, 4 + i % 5, 9, 10, 11], [-100, -100, 9, 10, 11], f"row {i}") for i in range(16)]
    return Batches(rows, batch_size=batch_size)


def train(method: dt.LoRADrop, steps: int = 6, output: Path | None = None, seed: int = 0, resume: bool = False,
          save: int = 3, layers: int = 4) -> tuple[nn.Module, dt.Adapter]:  # fmt: skip
    torch.manual_seed(0)
    model = tiny("llama", num_hidden_layers=layers)
    torch.manual_seed(seed)
    adapter = dt.attach(model, method)
    options = TrainOptions(max_steps=steps, lr=1e-2, batch_size=4, save_every=None if output is None else save)
    fit(model, adapter, data(), options=options, output=output, resume=resume)
    return model, adapter


def test_the_fewest_of_each_kind_that_reach_the_threshold_are_kept() -> None:
    kinds, g = ["q", "v", "q", "q", "v", "q"], torch.tensor([4.0, 1.0, 3.0, 2.0, 9.0, 1.0])
    every = {0, 1, 2, 3, 4, 5}
    for threshold, want in [(1e-9, {0, 4}), (0.4, {0, 4}), (0.5, {0, 2, 4}), (0.7, {0, 2, 4}), (0.71, {0, 2, 3, 4}),
                            (0.9, {0, 2, 3, 4}), (0.95, every), (1, every)]:  # fmt: skip
        assert OutputEvaluation(threshold=threshold).choose(kinds, g) == want, threshold
    tiny_tail = torch.tensor([1.0, 1e-30])
    assert OutputEvaluation(threshold=1).choose(["q", "q"], tiny_tail) == {0, 1}
    with pytest.raises(dt.DeltatuneError, match="taught 'q' nothing"):
        OutputEvaluation().choose(["q"], torch.zeros(1))


def evaluation(losses: list[Tensor], batches: int) -> tuple[nn.Module, dt.Adapter, Tensor]:
    """g after a trial of as many batches of a linear layer's regression, in the order given."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    adapter = dt.attach(net, dt.LoRADrop(r=2, targets=nn.Linear))
    run = Run(net, adapter, 10, losses=lambda n: (net(x).square().mean() for x in losses[:n]))
    units = [u for _, u in adapter.units()]
    return net, adapter, OutputEvaluation(batches=batches, lr=0.1, seed=4).outputs(run, units)


def test_importance_is_the_mean_squared_output_after_the_trial() -> None:
    """Against the same trial by hand, token by token, and with the adapter as it was."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, 6, generator=generator) for n in (2, 5, 1)]
    net, adapter, g = evaluation(batches, 3)
    assert all(not u.b.any() for _, u in adapter.units())
    torch.manual_seed(4)
    pairs = [(torch.empty(2, 6), torch.zeros(5, 2)), (torch.empty(2, 5), torch.zeros(6, 2))]
    for a, b in pairs:
        nn.init.kaiming_uniform_(a, a=5**0.5)
        a.requires_grad_()
        b.requires_grad_()
    s = 16 / 2

    def outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = s * x @ pairs[0][0].T @ pairs[0][1].T
        h = torch.tanh(x @ net[0].weight.T + net[0].bias + first)
        second = s * h @ pairs[1][0].T @ pairs[1][1].T
        return first, second, h @ net[2].weight.T + net[2].bias + second

    optimizer = torch.optim.AdamW([t for pair in pairs for t in pair], lr=0.1, weight_decay=0)
    for x in batches:
        optimizer.zero_grad()
        outputs(x)[2].square().mean().backward()
        optimizer.step()
    tokens = [token for x in batches for row in x for token in row]
    assert len(tokens) == 24
    for i in range(2):
        want = sum(float(outputs(token)[i].detach().square().sum()) for token in tokens) / 24
        assert float(g[i]) == pytest.approx(want, rel=1e-4)


def test_the_trial_leaves_no_trace_and_does_not_depend_on_where_the_factors_started() -> None:
    batches = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    net, adapter, first = evaluation(batches, 3)
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    with torch.no_grad():
        for _, u in adapter.units():
            u.a.mul_(-4)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    run = Run(net, adapter, 10, losses=lambda n: (net(x).square().mean() for x in batches[:n]))
    again = OutputEvaluation(batches=3, lr=0.1, seed=4).outputs(run, [u for _, u in adapter.units()])
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    for _, u in adapter.units():
        u.a.data.div_(-4)
    assert all(torch.equal(t, before[n]) for n, t in adapter.state_dict().items())
    assert all(p.grad is None for p in adapter.parameters())


def test_sites_that_share_have_one_parameter_whose_gradient_is_the_sum() -> None:
    model = tiny("llama", num_hidden_layers=3)
    kept = ("model.layers.1.self_attn.q_proj.weight",)
    adapter = dt.attach(model, dt.LoRADrop(r=2, kept=kept, targets=QV))
    units = {path: u for path, _, u, _ in adapter.sites()}
    q = [units[f"model.layers.{i}.self_attn.q_proj"] for i in range(3)]
    v = [units[f"model.layers.{i}.self_attn.v_proj"] for i in range(3)]
    assert q[0].a is q[2].a and q[0].b is q[2].b and q[1].a is not q[0].a
    assert v[0].a is v[1].a is v[2].a and v[0].a is not q[0].a
    own = copy.deepcopy(model)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
        for path, u in units.items():
            twin = next(t for name, _, t, _ in dt.adapters(own)["default"].sites() if name == path)
            twin.a, twin.b = nn.Parameter(u.a.clone()), nn.Parameter(u.b.clone())
    batch = inputs(model)
    for net in (model, own):
        net(**batch).logits.square().mean().backward()
    twins = {path: u for path, _, u, _ in dt.adapters(own)["default"].sites()}
    for n in "ab":
        want = sum(getattr(twins[f"model.layers.{i}.self_attn.q_proj"], n).grad for i in (0, 2))
        torch.testing.assert_close(getattr(q[0], n).grad, want, rtol=1e-5, atol=1e-8)
    # queries are 32 x 32, one pair of their own and one shared; values 16 x 32, one shared
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (32 + 32) * (1 + 1) + 2 * (16 + 32) * (0 + 1)


def test_a_run_chooses_then_trains_what_is_left(tmp_path: Path) -> None:
    method = dt.LoRADrop(r=2, threshold=0.6, trial=4, targets=QV)
    model, adapter = train(method, output=tmp_path / "run")
    kept = adapter.method.kept
    assert kept is not None and 2 <= len(kept) < 8
    kinds = [sum(name in site for site in kept) for name in ("q_proj", "v_proj")]
    assert all(1 <= n < 4 for n in kinds) and sum(kinds) == len(kept)
    size = 2 * (32 + 32) * (kinds[0] + 1) + 2 * (16 + 32) * (kinds[1] + 1)
    assert sum(p.numel() for p in adapter.parameters()) == size
    assert all(p.grad is not None or p.any() for p in adapter.parameters())
    batch = inputs(model)
    want = model(**batch).logits
    adapter.save(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == size
    dt.detach(model)
    again = dt.load(model, tmp_path / "adapter")
    torch.testing.assert_close(model(**batch).logits, want, rtol=1e-6, atol=1e-6)
    fit(model, again, data(), options=TrainOptions(max_steps=1, lr=1e-3, batch_size=4))  # the choice stands
    assert again.method == adapter.method and again.method.kept == kept


def test_a_resumed_run_chooses_the_same_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    method = dt.LoRADrop(r=2, threshold=0.6, trial=4, targets=QV)
    _, whole = train(method, 8, tmp_path / "whole")
    train(method, 8, tmp_path / "halves")
    (tmp_path / "halves" / "checkpoints" / "last").write_text("step-6")
    _, resumed = train(method, 8, tmp_path / "halves", seed=9, resume=True)
    assert resumed.method == whole.method
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_keeping_all_is_lora() -> None:
    ends = []
    for method in (dt.LoRADrop(r=2, threshold=1, trial=2, targets=QV), dt.LoRA(r=2, targets=QV)):
        _, adapter = train(method, layers=2)
        ends.append([p.detach() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_beside_another_method_only_its_own_sites_share() -> None:
    union = dt.Union(methods=(dt.Tune(), dt.LoRADrop(r=2, threshold=0.1, trial=2, targets=QV)))
    model, adapter = train(union, 2, layers=3)  # type: ignore[arg-type]
    (head, drop) = adapter.method.methods
    assert head == dt.Tune() and len(drop.kept) == 2
    assert {n.split(".")[0] for n, _ in adapter.named_parameters()} == {"shared", "model", "lm_head"}


def test_kinds_differ_in_all_but_the_number_of_the_block() -> None:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4),
                              "mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))})  # fmt: skip

    net = nn.ModuleDict({f"tower{i}": nn.ModuleList([block(), block()]) for i in (1, 2)})
    adapter = dt.attach(net, dt.LoRADrop(r=1, kept=(), targets=nn.Linear))
    names = ["fc1/weight 4x4", "fc2/weight 4x4", "mlp/0/weight 4x4", "mlp/1/weight 4x4", "mlp/2/weight 3x4"]
    want = [f"tower{i}/*/{name}" for i in (1, 2) for _ in range(2) for name in names]
    assert [u.kind for _, u in adapter.units()] == want
    assert len(list(adapter.parameters())) == 2 * 5 * 2


def test_peft_with_equal_pairs_computes_the_same() -> None:
    torch.manual_seed(0)
    ours = tiny("llama")
    batch = inputs(ours)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    adapter = dt.attach(ours, dt.LoRADrop(r=2, kept=("model.layers.0.self_attn.v_proj.weight",), targets=QV))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        for path, _, unit, _ in adapter.sites():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(unit.a)
            layer.lora_B["default"].weight.copy_(unit.b)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 5))
    adapter = dt.attach(net, dt.LoRADrop(targets=nn.Linear))
    (callback,) = adapter.callbacks()
    with pytest.raises(dt.DeltatuneError, match=r"Run.losses is None\); train with deltatune.train.fit"):
        callback.start(Run(net, adapter, 3))
    mixture = dt.attach(net, dt.Mixture(expert=dt.LoRADrop(), balance=0, targets=nn.Linear), "experts")
    with pytest.raises(dt.DeltatuneError, match="by itself or in a Union"):
        next(iter(mixture.callbacks())).start(Run(net, mixture, 3))
    with pytest.raises(dt.DeltatuneError, match="threshold must lie in"):
        dt.LoRADrop(threshold=0)
