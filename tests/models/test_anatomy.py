from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from deltatune.core.errors import DeltatuneError
from deltatune.core.select import Fused, Part, resolve
from deltatune.models import anatomy as table
from deltatune.models.anatomy import ANATOMY, anatomy, parts
from deltatune.models.tiny import _FAMILIES, FAMILIES, inputs, tiny
from deltatune.storage import layers as core_layers

core_layers.register(Conv1D, transposed=True)

BUILDS = [(family, task) for family in FAMILIES for task in _FAMILIES[family].heads]
SEQ2SEQ = ("t5", "mt5", "bart", "whisper")
CAUSAL = [f for f in FAMILIES if _FAMILIES[f].heads["lm"] == "AutoModelForCausalLM"]
FUSED = {
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {},  # multi-query
    "falcon-new": {},  # grouped
    "falcon-rw": {"multi_query": False, "alibi": True},
    "phi3": {},
}
PROJECTIONS = ("q", "k", "v", "o", "up", "gate", "down")
# what no part names, whatever the head above
REMAINDER = {
    "bert": r"bert\.(embeddings\.token_type_embeddings|pooler\.dense)",
    "roberta": r"roberta\.embeddings\.token_type_embeddings",
    "deberta-v2": r"deberta\.encoder\.rel_embeddings",
    "t5": r"(transformer\.)?(shared|\w+\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias)",
    "mt5": r"(transformer\.)?(shared|\w+\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias)",
    "bart": r"model\.shared",
}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "mt5"}
NO_MLP = {"opt", "bert", "roberta", "deberta-v2", "bart", "whisper"}
LEARNED_POSITIONS = {"gpt2", "opt", "bert", "roberta", "distilbert", "bart", "clip", "whisper"}


def build(family: str, task: str = "lm", **overrides):
    torch.manual_seed(0)
    return tiny("falcon" if family == "falcon-rw" else family, task, **overrides)


def paths(model: nn.Module, part: str) -> list[str]:
    return [m.path for m in resolve(model, Part(part))] if part in parts(model) else []


def blocks(family: str, task: str) -> tuple[int, int]:
    """Number of blocks, and of attention modules in them."""
    if family == "clip":
        return (4, 4) if task == "lm" else (2, 2)
    if family in SEQ2SEQ and (task == "lm" or (task == "classification" and family != "whisper")):
        decoder = 2 if family in ("t5", "mt5") else 3
        return 2 + decoder, 2 + decoder + decoder
    return 2, 2


@pytest.mark.parametrize(("family", "task"), BUILDS)
def test_every_part_is_found_the_right_number_of_times(family, task):
    model = build(family, task)
    n, attentions = blocks(family, task)
    count = {name: len(paths(model, name)) for name in vars(anatomy(model)) if name != "layout"}
    assert all(count[x] == attentions for x in ("attention", "q", "k", "v", "o"))
    assert all(count[x] == n for x in ("block", "up", "down"))
    assert count["gate"] == (n if family in GATED else 0)
    assert count["mlp"] == (0 if family in NO_MLP else n)
    assert count["cross_attention"] == attentions - n
    assert count["backbone"] == (0 if (family, task) == ("clip", "classification") else 1)
    sides = 2 if attentions > n else 1
    assert count["encoder"] == (family in SEQ2SEQ) and count["decoder"] == sides - 1
    text = family != "vit" and (family, task) not in {("whisper", "classification"), ("clip", "classification")}
    assert count["embedding"] == (text and (1 if family == "whisper" else sides))
    both = 2 if sides == 2 or (family, task) == ("clip", "lm") else 1
    assert count["position"] == (both if family in LEARNED_POSITIONS else 0)
    assert count["head"] >= 1


@pytest.mark.parametrize(("family", "task"), BUILDS)
def test_parts_have_the_right_types_and_cover_the_model(family, task):
    model = build(family, task)
    modules = dict(model.named_modules())
    named: dict[str, str] = {}
    for part in (*PROJECTIONS, "head", "embedding", "position"):
        kind = nn.Embedding if part in ("embedding", "position") else (nn.Linear, Conv1D)
        for path in paths(model, part):
            assert isinstance(modules[path], kind), (part, path)
            fused = isinstance(parts(model)[part], Fused)
            assert named.setdefault(path, part) == part or fused, f"{path} is both {named[path]} and {part}"
    rest = {p for p, m in modules.items() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding))} - set(named)
    assert {p for p in rest if not re.fullmatch(REMAINDER.get(family, ""), p)} == set()
    norms = {p for p, m in modules.items() if "Norm" in type(m).__name__}
    assert norms == set(paths(model, "norm"))
    head = set(paths(model, "head"))
    below = {p for p in modules for b in paths(model, "block") if p.startswith(f"{b}.")}
    assert not head & below and set(paths(model, "o")) <= below


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_backbone_has_the_same_parts(family):
    model = build(family)
    bare = AutoModel.from_config(model.config)
    for part in ("block", "attention", *PROJECTIONS, "embedding", "position"):
        ours, theirs = paths(bare, part), paths(model, part)
        assert len(ours) == len(theirs) and all(b.endswith(a) for a, b in zip(ours, theirs, strict=True)), part
    assert paths(bare, "head") == [] or family == "clip"
    (backbone,) = paths(bare, "backbone")
    assert backbone == {"opt": "decoder", "clip": "text_model"}.get(family, "encoder" if family in SEQ2SEQ else "")


@pytest.mark.parametrize("name", ["text_model", "vision_model"])
def test_clip_towers_stand_alone(name):
    tower = getattr(build("clip"), name)
    assert len(paths(tower, "q")) == 2 and paths(tower, "backbone") == [""]
    assert len(paths(tower, "embedding")) == (name == "text_model")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_takes_the_ids_and_runs_all_blocks_of_its_side(family):
    model = build(family)
    modules, log = dict(model.named_modules()), []
    (path,) = paths(model, "backbone")
    batch = inputs(model)
    key = next(k for k in ("input_ids", "input_features", "pixel_values") if k in batch)

    def entered(module, args, kwargs):
        given = [*args, *kwargs.values()]
        log.append(any(x is batch[key] or (torch.is_tensor(x) and torch.equal(x, batch[key])) for x in given))

    modules[path].register_forward_pre_hook(entered, with_kwargs=True)
    for block in paths(model, "block"):
        modules[block].register_forward_hook(lambda m, i, o, block=block: log.append(block))
    model(**batch)
    assert log.count(True) == 1
    log = log[log.index(True) :]
    inside = [b for b in paths(model, "block") if b.startswith(f"{path}.")]
    assert len(inside) == 2 and log[1:3] == inside


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sublayer_outputs_are_taken_before_the_residual(family):
    """With `o` and `down` silenced, a block is the identity, or its own norms where these come after the addition."""
    model = build(family)
    modules, seen, norms = dict(model.named_modules()), {}, []
    for path in (*paths(model, "o"), *paths(model, "down")):
        modules[path].register_forward_hook(lambda m, i, o: torch.zeros_like(o))
    for path in paths(model, "norm"):
        modules[path].register_forward_hook(lambda m, i, o, path=path: norms.append(path))

    def passed(module, args, kwargs, out):
        x = args[0] if args else kwargs["hidden_states"]
        seen[names[module]] = x, out[0] if isinstance(out, tuple) else out

    names = {modules[path]: path for path in paths(model, "block")}
    for block in names:
        block.register_forward_hook(passed, with_kwargs=True)
    model(**inputs(model))
    post_norm = bool(paths(model, "post_norm"))
    assert post_norm == (family in ("bert", "roberta", "deberta-v2", "distilbert", "bart"))
    assert len(seen) == len(paths(model, "block"))
    for path, (x, y) in seen.items():
        if post_norm:
            for norm in [n for n in norms if n.startswith(f"{path}.")]:
                x = modules[norm](x)
        assert torch.equal(x, y), path


def watch(module: nn.Module, store: list[torch.Tensor]) -> None:
    module.register_forward_pre_hook(lambda m, args: store.append(args[0]))


def rows_of(model: nn.Module, part: str) -> torch.Tensor:
    rows = [m.rows for m in resolve(model, Part(part))]
    assert all(r is not None for r in rows)
    return rows[0]


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_fused_values_are_those_the_attention_reads(family):
    """A causal model's first position attends to itself alone: its value, repeated over the group, reaches `o`."""
    model = build(family, **FUSED[family])
    modules, o_in, fused_out = dict(model.named_modules()), [], []
    fused, o = resolve(model, Part("v"))[0], paths(model, "o")[0]
    watch(modules[o], o_in)
    fused.module.register_forward_hook(lambda m, i, out: fused_out.append(out))
    model(**inputs(model))
    value = fused_out[0][:, 0, fused.rows].view(2, -1, table.head_dim(model.config))
    group = table.heads(model.config) // value.shape[1]
    torch.testing.assert_close(o_in[0][:, 0], value.repeat_interleave(group, 1).flatten(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_zeroed_value_rows_silence_the_attention(family):
    model = build(family, **FUSED[family])
    modules, o_in = dict(model.named_modules()), []
    fused, rows = resolve(model, Part("v"))[0].module, rows_of(model, "v")
    weight = core_layers.read(fused, "weight").clone()
    weight[rows] = 0
    core_layers.write(fused, "weight", weight)
    if fused.bias is not None:
        fused.bias[rows] = 0
    watch(modules[paths(model, "o")[0]], o_in)
    model(**inputs(model))
    assert o_in[0].count_nonzero() == 0


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_fused_queries_act_on_their_own_position_and_keys_on_later_ones(family):
    model, position = build(family, **FUSED[family]), 3
    modules, o_in = dict(model.named_modules()), []
    fused, factor = resolve(model, Part("q"))[0].module, {}

    def scale(module, args, out):
        out = out.clone()
        for rows in factor.values():
            out[:, position, rows] *= -2
        return out

    fused.register_forward_hook(scale)
    watch(modules[paths(model, "o")[0]], o_in)
    moved = {}
    for part in ("", "q", "k"):
        factor.clear()
        if part:
            factor[part] = rows_of(model, part)
        o_in.clear()
        model(**inputs(model))
        moved[part] = o_in[0]
    changed = {p: ((moved[p] - moved[""]).abs().amax(dim=(0, 2)) > 1e-6).tolist() for p in ("q", "k")}
    assert changed["q"] == [t == position for t in range(9)]
    assert changed["k"] == [t >= position for t in range(9)]


@pytest.mark.parametrize("family", FUSED)
def test_fused_pieces_part_the_rows(family):
    model = build(family, **FUSED[family])
    out = core_layers.read(resolve(model, Part("q"))[0].module, "weight").shape[0]
    rows = torch.cat([rows_of(model, part) for part in "qkv"])
    assert rows.sort().values.tolist() == list(range(out))


@torch.no_grad()
def test_gate_and_up_of_phi3_are_told_apart():
    model = build("phi3")
    mlp, hidden, fused = model.model.layers[0].mlp, [], []
    watch(mlp.down_proj, hidden)
    mlp.gate_up_proj.register_forward_hook(lambda m, i, out: fused.append(out))
    model(**inputs(model))
    gate, up = (fused[0][..., rows_of(model, part)] for part in ("gate", "up"))
    torch.testing.assert_close(hidden[0], nn.functional.silu(gate) * up)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sizes_from_the_configuration(family):
    model = build(family)
    config, a = model.config, anatomy(model)
    assert table.hidden(config) == 32 and table.heads(config) == 4
    for side in ("encoder", "decoder") if family in SEQ2SEQ else ("encoder",):
        named = paths(model, "block")
        own = [b for b in named if (side in b if family in SEQ2SEQ else "vision" not in b)]
        assert table.layers(config, side) == len(own)
    o = dict(model.named_modules())[paths(model, "o")[0]]
    width = core_layers.read(o, "weight").shape[1]
    assert table.heads(config) * table.head_dim(config) == width
    if family in CAUSAL or family in SEQ2SEQ:
        cache = model(**inputs(model), use_cache=True).past_key_values
        cache = getattr(cache, "self_attention_cache", cache)
        side = "decoder" if a.decoder else "encoder"
        assert len(cache.layers) == table.layers(config, side)
        for layer in cache.layers:
            assert layer.keys.shape == (2, table.kv_heads(config, side), 9, table.head_dim(config, side))


def test_sides_may_differ():
    config = build("bart", decoder_attention_heads=8).config
    assert (table.heads(config), table.heads(config, "decoder")) == (4, 8)
    assert (table.kv_heads(config, "decoder"), table.head_dim(config, "decoder")) == (8, 4)


def test_the_outputs_of_berts_two_sublayers_are_not_confused():
    model = build("bert")
    block = "bert.encoder.layer.0"
    assert paths(model, "o")[0] == f"{block}.attention.output.dense"
    assert (paths(model, "up")[0], paths(model, "down")[0]) == (f"{block}.intermediate.dense", f"{block}.output.dense")


def test_gpt2_with_cross_attention():
    model = build("gpt2", add_cross_attention=True)
    assert len(paths(model, "attention")) == len(paths(model, "o")) == 4
    assert paths(model, "cross_attention") == [f"transformer.h.{i}.crossattention" for i in range(2)]
    assert paths(model, "q") == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]


def test_all_of_a_fused_projection_is_the_projection():
    assert [m.rows for m in resolve(build("gpt2"), Part("q", "k", "v"))] == [None, None]


def test_every_pattern_is_used_by_some_tiny_model():
    unused = {(kind, name) for kind, a in ANATOMY.items() for name, p in vars(a).items() if isinstance(p, str)}
    models = [build(f, t) for f, t in BUILDS] + [build("clip").text_model, build("clip").vision_model]
    models += [build("gpt2", add_cross_attention=True), build("deberta-v2", position_biased_input=True)]
    models += [build("t5", feed_forward_proj="gated-gelu"), build("opt", do_layer_norm_before=False)]
    for model in models:
        unused -= {(model.config.model_type, name) for name in parts(model)}
    # towers on their own have neither a head nor themselves as a child
    assert unused <= {(f"clip_{tower}_model", name) for tower in ("text", "vision") for name in ("head", "backbone")}


def test_an_unknown_architecture_is_named_with_its_neighbours():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="gpt3")
    with pytest.raises(DeltatuneError, match=r"model type 'gpt3' .*give `targets` explicitly.*did you mean .*'gpt2'"):
        anatomy(model)
    with pytest.raises(DeltatuneError, match=r"Linear has no config\.model_type.*give `targets` explicitly"):
        anatomy(nn.Linear(2, 2))
