"""Ladder side-tuning: equations, what training keeps, pruned copies, caches, padding, packing, rows of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ladders import CAUSAL, ENCODERS, SEQ2SEQ, build, hooked, ladders, near, perturb
from torch import Tensor, nn

import deltatune as dt
from deltatune.methods.ladder import LadderSideTuning, ResidualLadder
from deltatune.models.pruning import blocks
from deltatune.models.tiny import inputs


def recompute(model: Any) -> dt.Adapter:
    """A ladder as wide as the backbone that reads h_0 alone and does again what the backbone did."""
    adapter = dt.attach(model, LadderSideTuning(reduction=1))
    with torch.no_grad():
        for path, module, u in ladders(adapter):
            u.alpha.fill_(50.0)
            u.down[0].weight.copy_(torch.eye(u.side.wide))  # type: ignore[operator, union-attr]
            u.down[0].bias.zero_()  # type: ignore[operator, union-attr]
            last = [
                m for n, m in module.named_children() if n in ("norm", "final_layernorm", "ln_f", "final_layer_norm")
            ]
            u.side.norm = copy.deepcopy(last[0]) if last and last[0] is not None else nn.Identity()
            if u.up is not None:
                u.up.weight.copy_(torch.eye(u.side.wide))
                u.up.bias.zero_()
            assert path == u.side.path
    return adapter


@pytest.mark.parametrize("family", (*CAUSAL, *ENCODERS, *SEQ2SEQ))
@torch.no_grad()
def test_a_ladder_as_wide_as_the_backbone_can_do_all_that_it_does(family: str) -> None:
    """Masks, windows, positions, biases, states of the other stack, copied weights: what is amiss shows in the end."""
    model = build(family)
    batch = inputs(model, batch=3)
    batch["attention_mask"][1, -3:] = 0
    batch["attention_mask"][2, :4] = family in ("bart", *ENCODERS)  # left padding, where positions allow it
    real = (
        batch["attention_mask"].bool() if family not in SEQ2SEQ else torch.ones_like(batch["decoder_input_ids"]).bool()
    )
    want = model(**batch).logits
    adapter = recompute(model)
    near(model(**batch).logits[real], want[real], 2e-5)
    for _, _, u in ladders(adapter):
        nn.init.normal_(u.side.rungs[0].get_parameter(next(n for n, _ in u.side.rungs[0].named_parameters())))
    assert (model(**batch).logits - want).abs().max() > 1e-3


def test_the_equations_on_a_narrow_transformer_of_the_same_architecture() -> None:
    """The reference is transformers' own narrow Llama, its rotary embedding included, into which the states are fed."""
    torch.manual_seed(0)
    model = build("llama", num_hidden_layers=3).double()
    adapter = perturb(dt.attach(model, LadderSideTuning(reduction=2, kept=(0, 2), temperature=0.3)), size=0.2)
    ((_, _, u),) = ladders(adapter)
    batch = inputs(model, batch=2)
    batch["attention_mask"][1, :3] = 0
    got = model(**batch).logits
    narrow = build("llama", hidden_size=16, intermediate_size=32, head_dim=4, num_hidden_layers=2).double().model
    for own, rung in zip(narrow.layers, u.side.rungs, strict=True):
        own.load_state_dict(rung.state_dict())
    narrow.norm = u.side.norm
    with dt.using(model):
        h = model(**batch, output_hidden_states=True).hidden_states
    states = [h[0], h[1]]
    seen, hooks = hooked({"last": model.model.layers[2]})
    with dt.using(model):
        model(**batch)
    hooks[0].remove()
    states.append(seen["last"])  # the last of hidden_states has been through the norm
    mu = 1 / (1 + torch.exp(-u.alpha / 0.3))

    def mix(j: int) -> Any:
        def hook(m: nn.Module, args: tuple[Any, ...]) -> Any:
            return (mu[j] * args[0] + (1 - mu[j]) * (states[j + 1] @ u.down[j + 1].weight.T + u.down[j + 1].bias),)

        return hook

    for j, layer in enumerate(narrow.layers):
        layer.register_forward_pre_hook(mix(j))
    g = narrow(inputs_embeds=u.down[0](states[0]), attention_mask=batch["attention_mask"]).last_hidden_state
    assert u.up is not None
    near(got, model.lm_head(g @ u.up.weight.T + u.up.bias), 1e-10)


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "t5", "bart"))
def test_the_backbone_is_the_base_and_has_no_gradient(family: str) -> None:
    model = build(family)
    batch = inputs(model)
    names = ("encoder_hidden_states", "decoder_hidden_states") if family in SEQ2SEQ else ("hidden_states",)
    with torch.no_grad():
        want = model(**batch, output_hidden_states=True)
    adapter = perturb(dt.attach(model, LadderSideTuning(reduction=2)))
    for p in model.parameters():
        p.requires_grad_(True)
    got = model(**batch, output_hidden_states=True)
    for name in names:
        assert len(want[name]) >= 3
        for one, base in zip(got[name][:-1], want[name][:-1], strict=True):  # the last is that of the output
            assert torch.equal(one, base) and not one.requires_grad
    got.logits.square().mean().backward()
    above = {id(p) for p in model.get_output_embeddings().parameters()}
    for _, module, _ in ladders(adapter):
        inside = [(n, p) for n, p in module.named_parameters() if "adapters" not in n.split(".") and id(p) not in above]
        assert inside and not [n for n, p in inside if p.grad is not None]
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_gate_that_is_shut_leaves_the_backbone_s_state_alone() -> None:
    model = build("gpt2")
    adapter = perturb(dt.attach(model, LadderSideTuning(reduction=4)))
    ((_, _, u),) = ladders(adapter)
    with torch.no_grad():
        u.alpha.fill_(-1e3)
    rungs, _ = hooked({str(i): r for i, r in enumerate(u.side.rungs)}, before=True)
    out, _ = hooked({str(i): b for i, (_, b) in enumerate(blocks(model, "transformer"))})
    model(**inputs(model))
    for i, down in enumerate(list(u.down)[1:]):
        near(rungs[str(i)], out[str(i)] @ down.weight.T + down.bias, 1e-6)  # type: ignore[operator, union-attr]


def kept_bytes(model: Any, batch: dict[str, Tensor]) -> int:
    """What a forward pass leaves for the backward pass, the parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if (at := t.untyped_storage().data_ptr()) not in own:
            found[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hold = model(**batch, use_cache=False)[0]
    assert hold.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("family", ("llama", "bert"))
def test_training_keeps_far_less_than_lora_and_than_full_fine_tuning(family: str) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    if family == "llama":
        wide["head_dim"] = 32
    bytes_of = {}
    for name, method in {"full": None, "lora": dt.LoRA(r=4), "ladder": LadderSideTuning(reduction=8)}.items():
        model = build(family, **wide)
        batch = {k: v for k, v in inputs(model, batch=4, length=64).items() if k in ("input_ids", "attention_mask")}
        if method is not None:
            dt.attach(model, method)
        bytes_of[name] = kept_bytes(model.base_model, batch)
    assert bytes_of["ladder"] < 0.3 * min(bytes_of["lora"], bytes_of["full"])
    floor = 4 * 64 * 128 * 4 * 7  # h_0 ... h_6, the inputs of the D_i
    assert bytes_of["ladder"] > floor


def test_only_the_side_network_is_saved_and_its_size_is_that_of_the_formula() -> None:
    model = build("llama", num_hidden_layers=4)
    adapter = dt.attach(model, LadderSideTuning(reduction=2, kept=(1, 2, 3)))
    d, n, ff, kv = 32, 16, 32, 2 * 4
    block = n * 16 + 2 * n * kv + 16 * n + 3 * n * ff + 2 * n
    want = 4 * (d * n + n) + 3 * block + n * d + d + 3 + n  # D, blocks, Up, gates, norm
    assert sum(p.numel() for p in adapter.parameters()) == want
    assert sum(t.numel() for t in adapter.state_dict().values()) == want
    assert all(k.split(".", 2)[2].split(".")[0] in ("alpha", "down", "side", "up") for k in adapter.state_dict())


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "t5", "bart", "vit", "whisper"))
def test_the_residual_ladder_starts_as_the_base(family: str) -> None:
    model = build(family)
    batch = inputs(model)
    with torch.no_grad():  # as a backbone beside a ladder always runs; kernels may differ
        want = model(**batch).logits
    adapter = dt.attach(model, ResidualLadder(reduction=2))
    assert torch.equal(model(**batch).logits, want)
    perturb(adapter)
    assert (model(**batch).logits - want).abs().max() > 1e-3


def test_the_first_rung_of_t5_owns_the_position_bias_of_all() -> None:
    model = build("t5")
    adapter = perturb(dt.attach(model, LadderSideTuning(reduction=2)), size=0.3)
    for _, _, u in ladders(adapter):
        made, given = [], []
        u.side.rungs[0].register_forward_hook(lambda m, i, o, made=made: made.append(o[1]))
        u.side.rungs[1].register_forward_pre_hook(lambda m, i, given=given: given.append(i[2]))
        model(**inputs(model))
        assert given[0] is made[0]
        assert sum("relative_attention_bias" in n for n, _ in u.named_parameters()) == 1


# heads and refusals


def test_a_pooler_reads_the_ladder() -> None:
    model = build("bert", "classification")
    batch = inputs(model)
    want = model(**batch).logits
    dt.attach(model, LadderSideTuning(reduction=2))
    seen, _ = hooked({"out": model.bert.pooler.dense}, before=True)
    got = model(**batch)
    hidden = model.bert(**batch).last_hidden_state
    near(seen["out"], hidden[:, 0])
    assert (got.logits - want).abs().max() > 1e-3
    near(got.logits, model.classifier(torch.tanh(model.bert.pooler.dense(hidden[:, 0]))))
    near(model(**batch, return_dict=False)[0], got.logits)


def test_states_that_the_backbone_projects_are_met_at_their_width() -> None:
    model = build("opt", word_embed_proj_dim=16)
    model.config.tie_word_embeddings = False
    ((_, _, u),) = ladders(dt.attach(model, LadderSideTuning(reduction=2)))
    assert u.up is not None and u.up.out_features == 16 and model(**inputs(model)).logits.shape[-1] == 99


@torch.no_grad()
def test_encoder_outputs_carry_the_states_of_the_ladder() -> None:
    model = build("t5")
    batch = inputs(model)
    plain = model.encoder(batch["input_ids"])
    perturb(dt.attach(model, LadderSideTuning(reduction=2)))
    with pytest.raises(dt.DeltatuneError, match="made without the side network"):
        model(encoder_outputs=plain, decoder_input_ids=batch["decoder_input_ids"])
    own = model.encoder(batch["input_ids"])
    assert own.last_hidden_state.shape[-1] == 32 + 16
    assert torch.equal(own.last_hidden_state[..., :32], plain.last_hidden_state)
    near(model(encoder_outputs=own, decoder_input_ids=batch["decoder_input_ids"]).logits, model(**batch).logits)


def test_prompts_go_outside_of_a_ladder() -> None:
    model = build("llama")
    dt.attach(model, dt.PromptTuning(length=3), "prompt")
    dt.attach(model, LadderSideTuning(reduction=2), "ladder")
    batch = inputs(model)
    dt.activate(model, "ladder", "prompt")
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]
    dt.activate(model, "prompt", "ladder")
    with pytest.raises(dt.DeltatuneError, match="prompts inside"):
        model(**batch)


@pytest.mark.parametrize("family,options,words", [
    ("llama", {"reduction": 3}, "reduction=3 does not divide hidden_size=32"),
    ("llama", {"kept": (0, 2)}, "has 2 blocks and none of number 2"),
    ("deberta-v2", {}, "no narrower copy"), ("clip", {}, "no narrower copy"),
    ("gpt_neox", {"reduction": 2}, "rotary frequencies"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_changes(family: str, options: dict[str, Any], words: str) -> None:
    model = build(family)
    types = [type(m) for m in model.modules()]
    with pytest.raises(dt.DeltatuneError, match=words):
        dt.attach(model, LadderSideTuning(**options))
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("options", [{"reduction": 0}, {"temperature": 0.0}, {"kept": ()}, {"kept": (1, 0)}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(dt.DeltatuneError):
        LadderSideTuning(**options)


def test_a_start_of_side_networks_is_none_of_lora() -> None:
    with pytest.raises(dt.DeltatuneError, match="PrunedByMagnitude starts a side network"):
        dt.attach(build("llama"), dt.LoRA(init=dt.PrunedByMagnitude()))


def test_a_block_that_was_skipped_is_told() -> None:
    model = build("bart", encoder_layerdrop=1.0).train()
    dt.attach(model, LadderSideTuning(reduction=2))
    with pytest.raises(dt.DeltatuneError, match="layerdrop"):
        model(**inputs(model))
