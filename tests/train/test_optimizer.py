"""AdamW and its 8-bit kind: the same maths, a quarter of the memory, a state that a checkpoint holds. What decays."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import packed_batches, whole_run
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import DeltatuneError
from deltatune.models.loading import load_base
from deltatune.models.tiny import inputs, tiny
from deltatune.registry import public
from deltatune.train import checkpoint
from deltatune.train.loop import fit
from deltatune.train.optimizer import groups, make, state_bytes
from deltatune.train.options import TrainOptions

eight_bits = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
CPU = torch.device("cpu")
EIGHT = TrainOptions(optimizer="adamw_8bit", lr=1e-2, weight_decay=0.1)


def _pair() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(96, 64)), nn.Parameter(torch.randn(40))]


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": [p], "lr": lr, "weight_decay": 0.1} for p, lr in zip(parameters, (1e-2, 2e-2), strict=True)]


def _steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = p.detach() + 0.3 * torch.randn(p.shape, generator=g)
        optimizer.step()


@eight_bits
def test_it_is_adamw_up_to_the_rounding_of_its_moments() -> None:
    ends = []
    for options in (TrainOptions(lr=1e-2, weight_decay=0.1), EIGHT):
        parameters = _pair()
        _steps(make(_groups(parameters), options, CPU), parameters, range(60))
        ends.append(parameters)
    start, (wide, eight) = _pair(), ends
    torch.testing.assert_close(eight[1], wide[1], atol=1e-6, rtol=1e-5)  # too small to be rounded
    assert not torch.equal(eight[0], wide[0])
    assert (eight[0] - wide[0]).norm() < 0.03 * (wide[0] - start[0]).norm()


@eight_bits
def test_the_bytes_of_its_state_are_those_that_plan_counts() -> None:
    parameters = _pair()
    for options in (TrainOptions(), EIGHT, TrainOptions(optimizer="paged_adamw_8bit")):
        optimizer = make(_groups(parameters), options, CPU)
        _steps(optimizer, parameters, range(1))
        held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for k, t in state.items()
                   if isinstance(t, torch.Tensor) and not k.startswith("qmap") and k != "step")  # fmt: skip
        assert state_bytes(parameters, options) == held


@eight_bits
def test_a_checkpoint_holds_its_state_bit_for_bit() -> None:
    one, two = _pair(), _pair()
    first = make(_groups(one), EIGHT, CPU)
    _steps(first, one, range(5))
    tensors, rest = checkpoint.optimizer_state(first)
    rest = json.loads(json.dumps(rest))
    second = make(_groups(two), EIGHT, CPU)
    for p, q in zip(two, one, strict=True):
        p.data.copy_(q)
    checkpoint.restore_optimizer(second, {k: t.clone() for k, t in tensors.items()}, rest)
    _steps(first, one, range(5, 9))
    _steps(second, two, range(5, 9))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


@eight_bits
def test_a_run_with_it() -> None:
    _, _, wide = whole_run(None, steps=6)
    _, _, eight = whole_run(None, steps=6, optimizer="adamw_8bit")
    got, want = ([r["loss"] for r in result.history if "loss" in r] for result in (eight, wide))
    assert got == pytest.approx(want, rel=1e-4)  # every factor of the tiny model is too small to be rounded


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DeltatuneError, match=r"train.optimizer: adamw_8bit needs bitsandbytes.*deltatune\[quant\].*adamw"
    ):
        make(_groups(_pair()), EIGHT, CPU)


EVERY = {name: cls() for name, cls in public("methods").items() if issubclass(cls, dt.core.Method)
         and name not in ("AdapterFusion", "S4")}  # fmt: skip
VARIED = {
    "LoRA, PiSSA": dt.LoRA(r=4, init=dt.PiSSA()),
    "LoRA, OLoRA": dt.LoRA(r=4, init=dt.OLoRA()),
    "LoRA, CorDA": dt.LoRA(r=4, init=dt.CorDA()),
    "LoRA, LoRA-GA": dt.LoRA(r=4, init=dt.LoRAGA()),
    "LoRA, EVA": dt.LoRA(r=4, init=dt.EVA()),
    "LoRA on a fused projection, PiSSA": dt.LoRA(r=4, targets=dt.Part("q", "v"), init=dt.PiSSA()),
    "OFT, learned magnitude": dt.OFT(magnitude="learned"),
    "BOFT, learned magnitude": dt.BOFT(magnitude="learned"),
    "DoRA of LoHa": dt.DoRA(inner=dt.LoHa(r=2)),
    "Mixture of DoRA": dt.Mixture(expert=dt.DoRA(), n=3, top_k=2),
    "LoRA and a head": dt.Union(methods=(dt.LoRA(), dt.Tune())),
    "LoRA and norms": dt.Union(methods=(dt.LoRA(), dt.Tune(targets=dt.Part("norm")))),
}
ELSEWHERE = {"IntrinsicPrompt", "IntrinsicSubspace", "LadderSideTuning", "MAM", "MultitaskPrompt", "PHMAdapter",
             "PTuning", "PTuningV2", "PrefixTuning", "PromptTuning", "SparseAdapter", "UniPELT"}  # fmt: skip
SPARED = {"BitFit", "IA3", "Tune"} | {f"LoRA, {init}" for init in ("PiSSA", "OLoRA", "CorDA", "LoRA-GA")}
SPARED |= {"LoRA on a fused projection, PiSSA"}


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*EVERY, *VARIED])
def test_what_has_learned_nothing_is_the_base_however_long_it_decays(name: str) -> None:
    torch.manual_seed(0)
    model: Any = tiny("gpt2" if name == "BitFit" or "fused" in name else "llama")
    base, method = _logits(model), (EVERY | VARIED)[name]
    adapter, options = dt.attach(model, method), TrainOptions(lr=0.1, weight_decay=0.5)
    if name in SPARED:
        with pytest.raises(DeltatuneError, match=f"weight_decay has no effect on this {type(method).__name__}"):
            groups(list(adapter.parameters()), adapter, options)
        return
    optimizer = make(groups(list(adapter.parameters()), adapter, options), options, CPU)
    if name == "LoRA, EVA":
        dt.initialise(adapter, lambda n: (model(**inputs(model)).logits.square().mean() for _ in range(n)))
    start = _logits(model)
    assert torch.allclose(start, base, atol=1e-4) is (name not in ELSEWHERE)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for _ in range(100):
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    if name not in ELSEWHERE:
        torch.testing.assert_close(_logits(model), start, atol=1e-4, rtol=1e-4)
    for p, was in zip(optimizer.param_groups[0]["params"], before, strict=True):
        torch.testing.assert_close(p.detach(), was * 0.95**100)


@eight_bits
@pytest.mark.parametrize("init", [dt.QPiSSA(), dt.LoftQ(iterations=3), dt.LoftQ()], ids=["qpissa", "loftq", "loftq, 1"])
def test_factors_whose_init_has_rewritten_the_base_do_not_decay(init: dt.core.Init, tmp_path: Path) -> None:
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    adapter = dt.attach(load_base(tmp_path, quantize="nf4", dtype=torch.float32), dt.LoRA(r=4, init=init))
    parameters, options = list(adapter.parameters()), TrainOptions(weight_decay=0.1, lr=1e-2)
    if init == dt.LoftQ():  # which leaves the base alone
        assert [g["weight_decay"] for g in groups(parameters, adapter, options)] == [0.1]
    else:
        with pytest.raises(DeltatuneError, match="no effect on this LoRA"):
            groups(parameters, adapter, options)


def test_a_run_decays_the_factors_of_dora_and_not_its_magnitude() -> None:
    ends = []
    for decay in (0.0, 0.9):
        torch.manual_seed(0)
        model: Any = tiny("llama")
        adapter = dt.attach(model, dt.DoRA())
        options = TrainOptions(max_steps=1, tokens_per_step=128, lr=0.1, warmup=0, weight_decay=decay)
        fit(model, adapter, packed_batches(), options=options)
        ends.append(dict(adapter.named_parameters()))
    for name, free in ends[0].items():
        assert torch.equal(free, ends[1][name]) is name.endswith((".m", ".b")), name  # B starts at 0


def test_without_decay_there_is_one_group_and_the_base_itself_decays_whole() -> None:
    model: Any = tiny("llama")
    weights = list(model.parameters())
    (group,) = groups(weights, None, TrainOptions(lr=1.0, weight_decay=0.1))
    assert group == {"params": weights, "lr": 1.0, "weight_decay": 0.1}
    adapter = dt.attach(model, dt.Houlsby())
    (group,) = groups(list(adapter.parameters()), adapter, TrainOptions(lr=1.0))
    assert group["weight_decay"] == 0.0 and len(group["params"]) == len(list(adapter.parameters()))
