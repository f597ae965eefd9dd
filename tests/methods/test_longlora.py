"""LongLoRA: segments against dense masks, no look ahead, what attention costs, interpolation, longer contexts."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from typer.testing import CliRunner

import deltatune as dt
from deltatune.cli.main import app
from deltatune.methods.longlora import Segments
from deltatune.models.tiny import inputs, tiny


def allowed(n: int, size: int, first: int) -> Tensor:
    """(n, n): whether query and key are in one segment, of those that begin at 0, first, first + size, ..."""
    number = torch.tensor([0 if i < first else 1 + (i - first) // size for i in range(n)])
    return number[:, None] == number[None]


class Call:
    """What transformers' attention functions do, in float64; `scores` counts the products of queries and keys."""

    def __init__(self, share: int) -> None:
        self.share, self.scores = share, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        k, v = (t.repeat_interleave(self.share, 1) for t in (k, v))
        assert q.shape[1] == k.shape[1]
        self.scores += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is None:
            mask = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
        score = score.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else score + mask
        return (score.softmax(-1) @ v).transpose(1, 2), "weights"


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "per head"])
@pytest.mark.parametrize("heads,kv", [(4, 4), (4, 2), (4, 1), (9, 3), (5, 5)])
@pytest.mark.parametrize("n,groups", [(16, 4), (13, 4), (8, 1), (3, 4), (1, 4)])
def test_segments_are_attention_under_block_masks(n: int, groups: int, heads: int, kv: int, kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 6, generator=g, dtype=torch.float64) for h in (heads, kv, kv))
    seen = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    if kind != "none":  # two documents packed into the first row
        seen = seen & torch.stack([allowed(n, n, n // 3), torch.ones(n, n, dtype=torch.bool)])[:, None]
    given: Tensor | None = {
        "none": None, "bool": seen, "additive": torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -1e30),
        "per head": seen.expand(-1, heads, -1, -1),
    }[kind]  # fmt: skip
    unit = Segments(groups).train()
    got, weights = unit(Call(heads // kv), q, k, v, given)
    size = math.ceil(n / groups)
    plain, shifted = allowed(n, size, 0), allowed(n, size, size // 2)
    where = torch.stack([plain if h < heads // 2 else shifted for h in range(heads)])
    want, _ = Call(heads // kv)(q, k, v, seen & where)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert weights is None
    full = unit.eval()(Call(heads // kv), q, k, v, given)
    torch.testing.assert_close(full[0], Call(heads // kv)(q, k, v, seen)[0])
    assert full[1] == "weights"


def test_a_step_of_decoding_sees_everything() -> None:
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (1, 8, 8))
    seen = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert torch.equal(Segments(4).train()(Call(1), q, k, v, seen)[0], Call(1)(q, k, v, seen)[0])


def attached(method: Any = None, **config: Any) -> tuple[Any, dt.Adapter]:
    torch.manual_seed(0)
    net = tiny("llama", **config)
    adapter = dt.attach(net, method or dt.LongLoRA(r=4))
    with torch.no_grad():
        for n, p in adapter.named_parameters():
            if n.endswith((".a", ".b")):
                p.add_(0.05 * torch.randn_like(p))
    return net, adapter


@pytest.mark.parametrize("length", [24, 22])
def test_no_token_sees_one_behind_it(length: int) -> None:
    """The last half group of a rolled sequence would share its segment with the first."""
    net, _ = attached()
    net.train()
    ids = torch.arange(3, 3 + length)[None]
    out = net(input_ids=ids).logits
    for late in (length - 1, length // 2, 1):
        other = ids.clone()
        other[0, late] = 90
        moved = (net(input_ids=other).logits - out).abs().amax(-1)[0]
        assert not moved[:late].any() and moved[late] > 1e-3


def test_information_passes_between_groups_through_the_shifted_heads_alone() -> None:
    """Two blocks of a group's reach: token 5 of [0, 6) is seen behind its group, token 0 is not by [6, 12)'s last."""
    net, _ = attached()
    net.train()
    ids = torch.arange(3, 27)[None]
    out, other = net(input_ids=ids).logits, ids.clone()
    other[0, 5] = 90
    moved = (net(input_ids=other).logits - out).abs().amax(-1)[0] > 1e-6
    assert moved[5:12].all() and not moved[15:].any()  # 5 -> 8 by the shift, 8 -> 11 within the group, or 14 by both


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_is_finite_with_padding_and_differs_from_inference(family: str, implementation: str) -> None:
    torch.manual_seed(0)
    net = tiny(family, attn_implementation=implementation)
    dt.attach(net, dt.LongLoRA(r=2))
    ids = torch.arange(3, 35).reshape(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = net.train()(input_ids=ids, attention_mask=mask).logits
    trained.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in dt.adapters(net)["default"].parameters())
    full = net.eval()(input_ids=ids, attention_mask=mask).logits
    assert trained.isfinite().all() and (trained - full).abs().max() > 1e-3


def test_at_inference_it_is_lora_with_trained_embeddings_and_norms() -> None:
    net, adapter = attached()
    other = tiny("llama")
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k.split(".")})
    parts = (dt.LoRA(r=4, targets=dt.Part("q", "k", "v", "o")), dt.Tune(targets=dt.Part("embedding", "norm")))
    twin = dt.attach(other, dt.Union(methods=parts))
    twin.load_state_dict(adapter.state_dict())
    given = inputs(net)
    assert torch.equal(net.eval()(**given).logits, other.eval()(**given).logits)


def test_what_trains() -> None:
    """r (in + out) at q, k, v, o of two blocks, V d of the embedding, five norms of d; kv heads are half the heads."""
    net, adapter = attached()
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 4 * (2 * 64 + 2 * 48) + 99 * 32 + 5 * 32


def scores(monkeypatch: pytest.MonkeyPatch, groups: int, length: int, training: bool) -> int:
    """Products of queries and keys in one forward pass of a model of two blocks."""
    net, _ = attached(dt.LongLoRA(r=1, groups=groups), max_position_embeddings=512, vocab_size=400)
    total, attend = 0, F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal total
        total += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return attend(q, k, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", counted)
        net.train(training)(input_ids=torch.randint(3, 90, (1, length)))
    return total


def test_attention_costs_in_proportion_to_the_number_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one size G of a group: k G^2 products a plain head, (k - 1/2) G^2 a shifted one, where full has (k G)^2."""
    size = 32
    for k in (2, 4, 8):
        assert scores(monkeypatch, k, k * size, True) == 2 * 2 * size**2 * (k + (k - 0.5))
        assert scores(monkeypatch, k, k * size, False) == 2 * 4 * (k * size) ** 2


def test_interpolated_positions_are_linear_scaling_of_rope() -> None:
    """Against transformers' own: rope_type "linear" with factor ceil(300 / 128) = 3."""
    net, _ = attached(dt.LongLoRA(r=2, context=300))
    scaled = tiny("llama", rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0})
    scaled.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k.split(".")})
    dt.attach(scaled, dt.LongLoRA(r=2)).load_state_dict(dt.adapters(net)["default"].state_dict())
    ids = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        got, want = (m.train(training)(input_ids=ids).logits for m in (net, scaled))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    dt.activate(net)
    assert (net(input_ids=ids).logits - got).abs().max() > 1e-2


def test_a_context_that_the_base_has_leaves_positions_alone() -> None:
    (net, _), (other, _) = attached(dt.LongLoRA(r=2, context=128)), attached(dt.LongLoRA(r=2))
    given = inputs(net)
    assert torch.equal(net(**given).logits, other(**given).logits)


def generated(net: Any) -> Tensor:
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    return net.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("context", [None, 128, 300])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_merged_it_answers_as_the_adapter_and_is_read_back_so(context: int | None, rope: Any, tmp_path: Any) -> None:
    parameters = {"rope_type": "default", "rope_theta": 10000.0} | rope
    net, adapter = attached(dt.LongLoRA(r=4, context=context), rope_parameters=parameters, tie_word_embeddings=True)
    net.eval()
    ids = torch.randint(3, 90, (1, 100), generator=torch.Generator().manual_seed(0))
    plain = {k: v.clone() for k, v in net.state_dict().items() if "adapters" not in k.split(".")}
    told, rotary, turns = net.config.to_dict(), net.model.rotary_emb, net.model.rotary_emb.inv_freq.clone()
    want, text = net(input_ids=ids).logits, generated(net)
    with dt.using(net):
        assert (net(input_ids=ids).logits - want).abs().max() > 1e-2
    assert adapter.mergeable
    dt.merge(net)
    torch.testing.assert_close(net(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(generated(net), text)
    again = pickle.loads(pickle.dumps(net))
    dt.unmerge(net)
    assert torch.equal(net(input_ids=ids).logits, want) and net.config.to_dict() == told
    assert torch.equal(rotary.inv_freq, turns) and all(torch.equal(v, net.state_dict()[k]) for k, v in plain.items())
    dt.unmerge(again)
    assert torch.equal(again(input_ids=ids).logits, want) and again.config.to_dict() == told
    dt.merge(net, keep=False)
    net.config.tie_word_embeddings = False
    net.save_pretrained(tmp_path)
    read = type(net).from_pretrained(tmp_path)
    torch.testing.assert_close(read(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(generated(read), text) and not dt.adapters(net)
    assert read.config.max_position_embeddings == 128 * (3 if context == 300 else 1)
    if context == 300:
        assert read.config.rope_parameters["factor"] == 3 * rope.get("factor", 1)


def test_the_merge_command_writes_a_model_of_the_longer_context(tmp_path: Any) -> None:
    end = tiny_tokenizer().eos_token_id
    sizes = {"max_position_embeddings": 512, "vocab_size": 400, "eos_token_id": end, "pad_token_id": end}
    net, adapter = attached(dt.LongLoRA(r=4, context=1000), **sizes)
    adapter.save(tmp_path / "adapter")
    dt.detach(net)
    net.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    given = ["merge", tmp_path / "base", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out", "--json"]
    result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)["written"]
    assert written["relative"] < 1e-5 and written["texts"] == written["prompts"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024 and config["rope_parameters"]["factor"] == 2


def test_merged_there_are_no_segments_in_training() -> None:
    net, _ = attached()
    given = inputs(net)
    want = net.eval()(**given).logits
    assert (net.train()(**given).logits - want).abs().max() > 1e-3
    dt.merge(net)
    torch.testing.assert_close(net.train()(**given).logits, want, rtol=1e-4, atol=1e-5)


def test_positions_that_a_configuration_cannot_say_are_not_merged() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    net, adapter = attached(dt.LongLoRA(r=2, context=300), rope_parameters=yarn)
    before, told = {k: v.clone() for k, v in net.state_dict().items()}, net.config.to_dict()
    with pytest.raises(dt.DeltatuneError, match="model.rotary_emb: positions divided by 3 beside RoPE of the type"):
        dt.merge(net)
    assert not adapter.mergeable and net.config.to_dict() == told
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    other, adapter = attached(rope_parameters=yarn)
    assert adapter.mergeable  # where positions are left as they are


def test_a_merge_that_fails_puts_positions_back() -> None:
    net, adapter = attached(dt.Union(methods=(dt.LongLoRA(r=2, context=300), dt.Tune())))
    told, turns = net.config.to_dict(), net.model.rotary_emb.inv_freq.clone()
    *_, (path, _, head, _) = adapter.sites()
    with torch.no_grad():
        head.v[0] = torch.inf  # type: ignore[index, operator]
    with pytest.raises(dt.DeltatuneError, match="lm_head.weight: merging would write non-finite"):
        dt.merge(net)
    assert path == "lm_head" and net.config.to_dict() == told
    assert torch.equal(net.model.rotary_emb.inv_freq, turns)


def test_it_learns_at_four_times_the_context_of_the_base() -> None:
    net, adapter = attached(dt.LongLoRA(r=4, context=128), max_position_embeddings=32)
    ids = (torch.arange(128) % 23 + 3)[None]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    net.train()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        value = net(input_ids=ids, labels=ids).loss
        value.backward()
        optimizer.step()
        losses.append(value.item())
    far = net.eval()(input_ids=ids).logits[0, 96:-1]
    assert losses[-1] < 0.5 * losses[0]
    assert F.cross_entropy(far, ids[0, 97:]) < 0.6 * losses[0]  # under full attention, beyond the base's context


def test_wrong_use_is_refused() -> None:
    for family, why in (("bloom", "no attention function"), ("t5", "no attention function")):
        with pytest.raises(dt.DeltatuneError, match=why):
            dt.attach(tiny(family), dt.LongLoRA())
    with pytest.raises(dt.DeltatuneError, match="select no module"):  # GPT-2's positions are learned
        dt.attach(tiny("gpt2"), dt.LongLoRA(context=512))
    for wrong in ({"groups": 0}, {"context": 0}):
        with pytest.raises(dt.DeltatuneError, match="LongLoRA: groups="):
            dt.LongLoRA(**wrong)
