"""The loss made by chunks at the head is the loss of the model's own logits, for every family and adapter at the head;
where it would not be, the logits are made."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import deltatune as dt
from deltatune.core import Intervention, Method, Site
from deltatune.data import Batches, Example, padded
from deltatune.kernels import cross_entropy
from deltatune.models import logits as treatments
from deltatune.models.logits import Treatment
from deltatune.models.tiny import FAMILIES, inputs, tiny
from deltatune.train import head
from deltatune.train.loss import autocast, evaluate, outcome

IGNORED = -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four rows of 99 logits."""
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 4 * 99 * 4)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two functions of the kernel were called."""
    called: list[str] = []
    for name in ("linear_cross_entropy", "head_cross_entropy"):
        real = getattr(head, name)
        monkeypatch.setattr(head, name, lambda *a, real=real, name=name, **k: called.append(name) or real(*a, **k))
    return called


def _given(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    given = inputs(model)
    ids = given.get("decoder_input_ids", given.get("input_ids"))
    assert ids is not None
    targets = torch.randint(0, 99, ids.shape, generator=torch.Generator().manual_seed(3))
    targets[0, :4] = targets[1, -1] = IGNORED
    return given, targets


def _whole(model: Any, given: dict[str, Tensor], targets: Tensor) -> Tensor:
    logits = model(**given).logits.flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _agree(model: Any, by: list[str], way: str) -> None:
    """Loss, hits and every gradient, of the second call as of the first."""
    given, targets = _given(model)
    for _ in range(2):
        found = head.loss_by_chunks(model, given, targets, IGNORED)
        assert found is not None and found.targets == (targets != IGNORED).sum()
        assert by[-1] == way
        leaves = [p for p in model.parameters() if p.requires_grad]
        mine = torch.autograd.grad(found.total, leaves, allow_unused=True)
        want = _whole(model, given, targets)
        torch.testing.assert_close(found.total, want, rtol=2e-6, atol=0)
        assert found.correct == (model(**given).logits.argmax(-1) == targets).sum()
        other = torch.autograd.grad(want, leaves, allow_unused=True)
        scale = max(float(g.abs().max()) for g in other if g is not None)
        assert scale > 1e-3
        for one, two in zip(mine, other, strict=True):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-6 * scale)
    assert not head.head_of(model)._forward_hooks and not head.head_of(model)._forward_pre_hooks  # type: ignore[union-attr]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "clip")])
def test_every_familys_loss_and_gradients_are_those_of_its_logits(family: str, ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny(family)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    _agree(model, ways, "linear_cross_entropy")


def _of(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    size |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(size | settings)))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.ndim > 1 else p.add_(0.1)
    return model.eval()


_FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}


@pytest.mark.parametrize(
    ("kind", "settings", "want"),
    [
        ("gemma2", {"final_logit_softcapping": 2.5, "head_dim": 8}, Treatment(cap=2.5)),
        ("gemma3_text", {"final_logit_softcapping": 2.5, "head_dim": 8}, Treatment(cap=2.5)),
        ("nanochat", {"final_logit_softcapping": 2.5}, Treatment(cap=2.5)),
        ("recurrent_gemma", {"logits_soft_cap": 2.5, "num_hidden_layers": 3, "lru_width": 32}, Treatment(cap=2.5)),
        ("granite", {"logits_scaling": 5.0}, Treatment(scale=0.2)),
        ("granitemoe", {"logits_scaling": 5.0, "num_local_experts": 2}, Treatment(scale=0.2)),
        ("hyperclovax", {"logits_scaling": 5.0}, Treatment(scale=5.0)),
        ("falcon_h1", _FALCON_H1 | {"lm_head_multiplier": 0.25}, Treatment(scale=0.25)),
        ("cohere", {"logit_scale": 0.25}, Treatment(scale=0.25)),
        ("cohere2", {"logit_scale": 0.25}, Treatment(scale=0.25)),
    ],
)
def test_caps_and_scales_are_found_and_applied(
    kind: str, settings: dict[str, Any], want: Treatment, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Treatment | None] = []
    real = head.treatment
    monkeypatch.setattr(head, "treatment", lambda *a: found.append(real(*a)) or found[-1])
    _agree(_of(kind, **settings), ways, "linear_cross_entropy")
    assert found == [want]  # looked for once


def test_what_a_treatment_leaves_unexplained_is_not_known() -> None:
    model = _of("granite", logits_scaling=5.0)
    given = treatments.probe(torch.zeros(1, 0, 99, dtype=torch.bfloat16))
    assert given.shape == (1, 3, 99) and given.dtype is torch.float32
    for made, want in (
        (given / 5, Treatment(scale=0.2)),
        ((given / 5).bfloat16(), Treatment(scale=0.2)),
        (given * 5, Treatment(scale=5.0)),
        (given, Treatment()),
        (given / 4, None),
        (given / 5 + 1e-6, None),
        (given.log_softmax(-1), None),
        (given.masked_fill(torch.arange(99) == 7, -1e9), None),
        (given[..., :-1], None),
        (30 * torch.tanh(given / 5 / 30), None),
        (given / 5 * torch.nan, None),
        (None, None),
    ):
        assert treatments.treatment(model, given, made) == want


class Tempered(nn.Module):
    """A model of unknown ways: its last act is `temper`."""

    def __init__(self, model: Any, temper: Any) -> None:
        super().__init__()
        self.inner, self.temper, self.calls, self.config = model, temper, 0, model.config

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        out = self.inner(**inputs)
        out.logits = self.temper(out.logits)
        return out


def test_an_unknown_treatment_makes_the_logits_and_moves_no_random_number(ways: list[str]) -> None:
    torch.manual_seed(0)
    inner: Any = tiny("gpt2", resid_pdrop=0.3).train()
    model = Tempered(inner, lambda z: z.sign() * z.abs().sqrt())
    examples = [Example([5, 6, 7, 8, 9], [-100, 6, 7, 8, 9], "a"), Example([11, 12, 13], [11, 12, 13], "b")]
    batch = padded(examples, pad=0)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(float(outcome(model, batch, "causal").total.detach()))
    assert model.calls == 3  # one of them to see the probe
    torch.manual_seed(5)
    logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum").item()
    assert found == [pytest.approx(want, rel=1e-6)] * 2
    assert not ways


def test_a_known_treatment_takes_one_pass_and_the_same_random_numbers_every_time() -> None:
    torch.manual_seed(0)
    inner: Any = tiny("gpt2", resid_pdrop=0.3).train()
    model = Tempered(inner, lambda z: z)
    given, targets = _given(inner)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        total = head.loss_by_chunks(model, given, targets, IGNORED).total  # type: ignore[union-attr]
        found.append((float(total.detach()), torch.rand(()).item()))
    assert found[0] == found[1] and model.calls == 2


def _adapt(model: Any, method: Method) -> None:
    adapter = dt.attach(model, method)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)), alpha=0.2)


@pytest.mark.parametrize("family", ["gemma2", "phi", "bart"])  # a cap and a tied head, a bias, a constant
@pytest.mark.parametrize("method", [dt.LoRA(r=2), dt.DoRA(inner=dt.LoRA(r=2)), dt.Tune()], ids=["lora", "dora", "tune"])
def test_adapters_of_the_heads_weight_get_their_gradients(family: str, method: Method, ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny(family, **({"final_logit_softcapping": 2.0} if family == "gemma2" else {}))
    if family == "bart":
        model.final_logits_bias.normal_()
    body = "fc1" if family == "phi" else r".*\.(q_proj|v_proj)"
    _adapt(model, type(method)(**(vars(method) | {"targets": ("lm_head", body)})))
    _agree(model, ways, "head_cross_entropy")
    dt.merge(model)
    _agree_frozen(model, ways)


def _agree_frozen(model: Any, ways: list[str]) -> None:
    given, targets = _given(model)
    found = head.loss_by_chunks(model, given, targets, IGNORED)
    assert found is not None and ways[-1] == "linear_cross_entropy"
    torch.testing.assert_close(found.total.detach(), _whole(model, given, targets).detach(), rtol=2e-6, atol=0)


def test_adapters_elsewhere_leave_the_head_to_its_weight(ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    _adapt(model, dt.LoRA(r=2))
    _agree(model, ways, "linear_cross_entropy")


class Sizes(TorchDispatchMode):
    """The largest tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("method", [dt.LoRA(r=2), dt.LoRA(r=2, targets=("lm_head", "q_proj"))], ids=["body", "head"])
@pytest.mark.parametrize("training", [True, False])
def test_no_logits_of_all_tokens_exist(method: Method, training: bool) -> None:
    model: Any = tiny("llama", vocab_size=4000)
    dt.attach(model, method)
    examples = [Example(list(range(5, 105)), list(range(5, 105)), "a")]
    batch = padded(examples, pad=0)
    for _ in range(2):  # the first time, too
        with Sizes() as seen, torch.set_grad_enabled(training):
            found = outcome(model, batch, "causal")
            if training:
                found.total.backward()
        assert seen.most <= 4000 * 32 < 4000 * 99 and found.targets == 99


class Reweigh(Intervention):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(99))

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(out, Tensor):
            return out + self.by
        out.logits = out.logits + self.by
        return out


@dataclass(frozen=True, kw_only=True)
class Reweighing(Method):
    """Begins as nothing, so no probe would show it."""

    at: ClassVar[tuple[str, ...]] = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        return Reweigh(site)


@pytest.mark.parametrize("where", ["head", "model"])
def test_code_around_the_head_keeps_the_logits(where: str, ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    examples = [Example([5, 6, 7, 8, 9], [-100, 6, 7, 8, 9], "a"), Example([11, 12, 13], [11, 12, 13], "b")]
    batch = padded(examples, pad=0)
    outcome(model, batch, "causal")
    assert ways == ["linear_cross_entropy"]
    adapter = dt.attach(model, Reweighing(targets=lambda path, m: path == ("lm_head" if where == "head" else "")))
    total = outcome(model, batch, "causal").total
    logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
    mine, other = (torch.autograd.grad(x, list(adapter.parameters())) for x in (total, want))
    torch.testing.assert_close(mine, other)
    assert mine[0].any() and ways == ["linear_cross_entropy"]
    dt.detach(model)
    outcome(model, batch, "causal")
    assert ways == ["linear_cross_entropy"] * 2


def test_experts_at_the_head_keep_the_logits(ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    _adapt(model, dt.Mixture(expert=dt.LoRA(r=2, targets="lm_head"), n=2, top_k=1, targets="lm_head"))
    given, targets = _given(model)
    assert head.loss_by_chunks(model, given, targets, IGNORED) is None and not ways


def test_hooks_on_the_head_are_run_by_chunks(ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[-2]) or 2 * out)
    given, targets = _given(model)
    found = head.loss_by_chunks(model, given, targets, IGNORED)
    torch.testing.assert_close(found.total, _whole(model, given, targets))  # type: ignore[union-attr]
    assert ways == ["head_cross_entropy"] and max(seen[:-1]) <= 4 and sum(seen[:-1]) == found.targets + 2  # type: ignore[union-attr]


def test_what_is_known_of_a_model_goes_with_it() -> None:
    model: Any = tiny("llama")
    dt.attach(model, dt.LoRA(r=2))
    given, targets = _given(model)
    head.loss_by_chunks(model, given, targets, IGNORED)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_hook_that_comes_later_is_seen(ways: list[str]) -> None:
    model: Any = tiny("llama")
    given, targets = _given(model)
    assert head.loss_by_chunks(model, given, targets, IGNORED) is not None

    def square(module: nn.Module, args: Any, out: Any) -> Any:
        out.logits = out.logits**2
        return out

    model.register_forward_hook(square)
    assert head.loss_by_chunks(model, given, targets, IGNORED) is None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["q_proj", ("q_proj", "lm_head")], ids=["body", "head"])
def test_in_bf16_the_loss_is_that_of_bf16_logits(stored: torch.dtype, targets: Any, ways: list[str]) -> None:
    torch.manual_seed(0)
    model: Any = tiny("gemma2", final_logit_softcapping=8.0).to(stored)
    adapter = dt.attach(model, dt.LoRA(r=2, targets=targets))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)).to(p), alpha=0.2)
    given, wanted = _given(model)
    with autocast(torch.device("cpu"), torch.bfloat16):
        found = head.loss_by_chunks(model, given, wanted, IGNORED)
        want = _whole(model, given, wanted)
    assert found is not None and len(ways) == 1
    torch.testing.assert_close(found.total, want, rtol=3e-3, atol=0)
    leaves = list(adapter.parameters())
    for one, two in zip(torch.autograd.grad(found.total, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert one.dtype is two.dtype
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.03 * float(two.abs().max()))


def test_evaluation_is_by_chunks_too(ways: list[str]) -> None:
    model: Any = tiny("llama")
    examples = [Example(list(range(5, 25)), list(range(5, 25)), "a"), Example([7, 8, 9], [7, 8, 9], "b")]
    held_out = Batches(examples, batch_size=1)
    scores = evaluate(model, held_out)
    assert ways == ["linear_cross_entropy"] * 2
    want = [_whole(model, b.inputs, F.pad(b.labels[:, 1:], (0, 1), value=IGNORED)) for b in _batches(held_out)]
    assert scores["eval_loss"] == pytest.approx(float(sum(want)) / 21, rel=1e-6)


def _batches(held_out: Batches) -> Iterator[Any]:
    with torch.no_grad():
        yield from held_out.once()
