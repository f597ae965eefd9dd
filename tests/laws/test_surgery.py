"""Where adapters go, what is refused and how it is said, tied and fused weights, layers that are not linear."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from table import METHODS, batch, logits, model, perturb
from torch import nn

import deltatune as dt
from deltatune.core import Delta, Intervention, Method


def paths(net, targets):
    return [s.path for s in dt.plan(net, dt.LoRA(r=2, targets=targets)).sites]


def test_targets_by_name_pattern_type_predicate_range_and_tuple():
    net = model("llama")
    q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert paths(net, "q_proj") == paths(net, r".*\.q_proj") == paths(net, dt.Part("q")) == q
    assert paths(net, "self_attn.q_proj") == q and paths(net, q[1]) == q[1:]
    assert paths(net, lambda path, m: path.endswith("q_proj")) == q
    assert paths(net, ["q_proj", "v_proj"]) == paths(net, r".*\.(q|v)_proj")
    assert len(paths(net, "all-linear")) == 14 and "lm_head" not in paths(net, "all-linear")
    assert len(paths(net, nn.Linear)) == 15
    assert (
        paths(net, dt.Layers(targets="q_proj", start=1)) == q[1:] == paths(net, dt.Layers(targets="q_proj", start=-1))
    )
    assert paths(net, None) == paths(net, "all-linear")


def test_the_head_is_no_target_of_all_linear_in_a_classifier():
    assert "score" not in paths(model("llama", task="classification"), "all-linear")


@pytest.mark.parametrize(
    "targets,words",
    [
        ("q_prj", ["'q_prj'", "did you mean 'q_proj'"]),
        (r".*\.(q|v)_prok", ["match no module"]),
        (["q_proj", "v_porj"], ["'v_porj'", "did you mean 'v_proj'"]),
        (nn.Conv2d, ["select no module", "Linear"]),
        (dt.Part("query"), ["no part 'query'", "it has"]),
        (dt.Layers(targets="q_proj", start=7), ["none of 2 blocks", "7:None"]),
        ("model.layers", ["'model.layers' is a container (ModuleList)"]),
        ("act_fn", ["has a weight"]),
        (3, ["3 is no selection"]),
    ],
)
def test_what_matches_nothing_names_the_nearest(targets, words):
    net = model("llama")
    with pytest.raises(dt.DeltatuneError) as e:
        dt.attach(net, dt.LoRA(targets=targets))
    assert all(w in str(e.value) for w in words), str(e.value)
    assert not dt.adapters(net)


def test_names_that_cannot_be_used_are_refused():
    net = model("llama")
    dt.attach(net, dt.LoRA(), "law")
    for name, words in [
        ("law", "already attached"),
        ("a.b", "cannot name"),
        ("keys", "cannot name"),
        ("", "cannot name"),
    ]:
        with pytest.raises(dt.DeltatuneError, match=words):
            dt.attach(net, dt.LoRA(), name)
    with pytest.raises(dt.DeltatuneError, match="no adapter 'lwa'; did you mean 'law'"):
        dt.activate(net, "lwa")
    with pytest.raises(dt.DeltatuneError, match="has no adapter"):
        dt.activate(model("llama"), "law")


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"dropout": 1.0}, {"scaling": "alpha"}, {"ranks": {"q_proj": 0}}], ids=lambda o: next(iter(o))
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(dt.DeltatuneError):
        dt.LoRA(**options)


class Failing(Delta):
    def __init__(self, site):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1))

    def weight(self, w):
        raise RuntimeError("in the forward")


def failing_method():
    class Fails(Method):
        def build(self, site, shared):
            return Failing(site)

    return Fails(targets="q_proj")


def test_an_exception_inside_a_forward_leaves_nothing_changed():
    net = model("llama")
    given_ = batch(net)
    want = logits(net, given_)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    dt.attach(net, failing_method(), "bad")
    with pytest.raises(RuntimeError, match="in the forward"):
        logits(net, given_)
    with pytest.raises(RuntimeError, match="in the forward"), dt.using(net, "bad"):
        logits(net, given_)
    with pytest.raises(RuntimeError, match="in the forward"):
        dt.merge(net)
    dt.detach(net)
    assert torch.equal(logits(net, given_), want)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


def test_a_merge_that_would_write_nan_writes_nothing():
    net = model("llama")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    adapter = perturb(dt.attach(net, dt.LoRA(r=2)))
    with torch.no_grad():
        list(adapter.parameters())[-1][0] = float("nan")
    with pytest.raises(dt.DeltatuneError, match=r"down_proj.weight: merging would write non-finite"):
        dt.merge(net)
    dt.activate(net)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bloom"])
def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone(architecture):
    """The embedding and the head are one tensor; the adapter acts on the lookup, so merging must part them."""
    net = model(architecture)
    head = net.get_output_embeddings()
    assert head.weight is net.get_input_embeddings().weight
    given_ = batch(net)
    perturb(dt.attach(net, dt.LoRA(r=3, targets=dt.Part("embedding"))))
    want, kept = logits(net, given_), head.weight.detach().clone()
    dt.merge(net)
    torch.testing.assert_close(logits(net, given_), want, atol=1e-5, rtol=1e-4)
    tables = [net.get_submodule(s) for s in paths(net, dt.Part("embedding"))]
    assert torch.equal(head.weight, kept) and all(t.weight is not head.weight for t in tables)
    dt.unmerge(net)
    assert all(t.weight is head.weight for t in tables) and torch.equal(logits(net, given_), want)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_rows_of_a_fused_projection(sizes, groups, unit, data):
    """Against a loop that writes the layout down: group by group, piece by piece."""
    piece = data.draw(st.integers(0, len(sizes) - 1))
    layout = [p for _ in range(groups) for p, size in enumerate(sizes) for _ in range(size * unit)]
    fused = dt.Fused(targets="x", sizes=tuple(sizes), take=(piece,), groups=groups)
    assert fused.rows(len(layout), piece).tolist() == [i for i, p in enumerate(layout) if p == piece]
    if groups * sum(sizes) > 1:
        with pytest.raises(dt.DeltatuneError):
            fused.rows(len(layout) + 1, piece)


def test_merged_linear_is_a_lora_on_each_enabled_third():
    """loralib's MergedLinear with [True, False, True] is two LoRAs on the outer thirds; the middle stays the base's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 30))
    x, w0 = torch.randn(5, 8), net[0].weight.detach().clone()
    method = dt.LoRA(r=2, alpha=6, targets=dt.Fused(targets="0", sizes=(1, 1, 1), take=(0, 2)))
    adapter = perturb(dt.attach(net, method))
    (_, first), (_, last) = adapter.units()
    w = w0.clone()
    w[:10] += 3.0 * first.inner.b @ first.inner.a
    w[20:] += 3.0 * last.inner.b @ last.inner.a
    torch.testing.assert_close(net(x), F.linear(x, w, net[0].bias))
    assert torch.equal(net(x)[:, 10:20], F.linear(x, w0, net[0].bias)[:, 10:20])
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 2 * (8 + 10)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "gpt_neox", "falcon", "phi3"])
def test_all_parts_of_a_fused_projection_are_the_projection(architecture):
    net = model(architecture)
    whole, parts = dt.plan(net, dt.LoRA(targets=dt.Part("q", "k", "v"))), dt.plan(net, dt.LoRA(targets=dt.Part("q")))
    assert len(whole.sites) == len(parts.sites) and whole.sites[0].out > parts.sites[0].out / 2


@pytest.mark.parametrize("conv,size", [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2}], ids=str)
def test_convolutions_need_no_method_code(conv, size, options):
    torch.manual_seed(0)
    net = nn.Sequential(conv(4, 6, 3, **options))
    x = torch.randn(2, 4, *[7] * size)
    for method in (
        dt.LoRA(r=2, targets=conv),
        dt.DoRA(inner=dt.LoRA(r=2), targets=conv),
        dt.IA3(targets=conv, on_input=None),
    ):
        adapter = perturb(dt.attach(net, method))
        ((_, unit),) = adapter.units()
        twin = copy.deepcopy(net[0])
        dt.detach(twin)
        with torch.no_grad():
            twin.weight.copy_(unit.weight(twin.weight.flatten(1)).view_as(twin.weight))
            twin.bias.copy_(unit.bias(twin.bias))
        torch.testing.assert_close(net(x), twin(x), atol=1e-5, rtol=1e-4)
        dt.merge(net, keep=False)
        torch.testing.assert_close(net(x), twin(x), atol=1e-5, rtol=1e-4)
        assert not dt.adapters(net) and type(net[0]) is conv


def test_dropout_acts_in_training_alone_and_never_on_the_base_path():
    net = nn.Sequential(nn.Linear(400, 3, bias=False))
    perturb(dt.attach(net, dt.LoRA(r=4, dropout=0.5, targets="0")))
    x = torch.ones(1, 400)
    still = net.eval()(x)
    net.train()
    assert torch.equal(net.eval()(x), still) and not torch.equal(net.train()(x), net(x))
    draws = torch.stack([net.train()(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(draws, still, atol=0.15, rtol=0.05)


def test_interventions_surround_a_call_and_are_saved(tmp_path):
    class Shift(Intervention):
        def __init__(self, site):
            super().__init__()
            self.v = nn.Parameter(torch.full((site.shape.out,), 0.5, **site.like))

        def forward(self, call, x):
            return call(x) + self.v

    class Shifted(Method):
        at = ("call",)

        def build(self, site, shared):
            return Shift(site)

    net = model("llama")
    given_ = batch(net)
    adapter = dt.attach(net, Shifted(targets=lambda p, m: p.endswith("o_proj")), "shift")
    want = logits(net, given_)
    adapter.save(tmp_path)
    other = model("llama")
    dt.load(other, tmp_path)
    torch.testing.assert_close(logits(other, given_), want)
    with pytest.raises(dt.DeltatuneError, match="Shift acts on activations and cannot be merged"):
        dt.merge(net)


def test_a_saved_adapter_for_another_base_names_the_shapes(tmp_path):
    dt.attach(model("llama"), METHODS["dora"], "big").save(tmp_path)
    net = model("llama", hidden_size=48, num_attention_heads=4)
    types = [type(m) for m in net.modules()]
    with pytest.raises(dt.DeltatuneError, match=r"saved for another base.*\(4, 32\).*\(4, 48\)"):
        dt.load(net, tmp_path)
    assert [type(m) for m in net.modules()] == types


def test_damaged_folders_say_what_is_missing(tmp_path):
    net = model("llama")
    with pytest.raises(dt.DeltatuneError, match="no adapter_config.json"):
        dt.load(net, tmp_path)
    dt.attach(net, dt.LoRA(r=2), "a").save(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(dt.DeltatuneError, match="damaged"):
        dt.load(model("llama"), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(dt.DeltatuneError, match="is missing"):
        dt.load(model("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(dt.DeltatuneError, match="not valid JSON"):
        dt.load(model("llama"), tmp_path)


def test_a_full_disk_leaves_the_saved_adapter_as_it_was(tmp_path, monkeypatch):
    net = model("llama")
    adapter = perturb(dt.attach(net, dt.LoRA(r=2)))
    adapter.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    perturb(adapter, 5)
    with pytest.raises(dt.DeltatuneError, match="No space left on device.*unchanged"):
        adapter.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_everything_public_is_listed():
    named = set(dt.__all__)
    assert len(named) == len(dt.__all__) and all(hasattr(dt, n) for n in named)
    assert set(dt.methods()) <= named
