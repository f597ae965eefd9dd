"""What we write in PEFT's layout, PEFT computes with the same outputs, and so do we when we read it again."""

import json

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_pairs import base, close, config_of, edit, from_peft, outputs, saved, tensors_of
from torch import nn

import deltatune as dt
from deltatune.interop.peft_format_common import _aliases
from deltatune.models.tiny import inputs

FAMILIES = ["llama", "gpt2", "bloom", "bert", "t5", "opt"]
BIASED = ["gpt2", "bloom", "bert", "opt"]
METHODS = {
    "lora": dt.LoRA(r=4),
    "rslora": dt.LoRA(targets="all-linear", r=3, scaling="alpha/sqrt(r)"),
    "fused rows": dt.LoRA(targets=dt.Part("q", "v"), r=3, alpha=5),
    "embedding": dt.LoRA(targets=dt.Part("embedding"), r=3),
    "pissa": dt.LoRA(r=3, init=dt.PiSSA()),
    "olora root": dt.LoRA(r=3, alpha=2, scaling="alpha/sqrt(r)", init=dt.OLoRA()),
    "dora": dt.DoRA(inner=dt.LoRA(r=4)),
    "dora fused rows": dt.DoRA(targets=dt.Part("q", "v")),
    "dora embedding": dt.DoRA(targets=dt.Part("embedding")),
    "dora pissa": dt.DoRA(targets=dt.Part("up", "down"), inner=dt.LoRA(r=2, init=dt.PiSSA())),
    "ia3": dt.IA3(),
    "adalora": dt.AdaLoRA(),
    "adalora fused rows": dt.AdaLoRA(targets=dt.Part("q", "v", "up")),
    "two ranks at once": dt.Union(
        methods=(dt.LoRA(targets=dt.Part("q"), r=2), dt.LoRA(targets=dt.Part("v"), r=5, alpha=3))
    ),
    "norms": dt.Union(methods=(dt.LoRA(), dt.Tune(targets=dt.Part("norm")))),
    "head": dt.Union(methods=(dt.LoRA(), dt.Tune())),
    "ia3 head": dt.Union(methods=(dt.IA3(), dt.Tune())),
    "tuned embedding": dt.Union(methods=(dt.DoRA(), dt.Tune(targets=dt.Part("embedding")))),
}
BIASES = {
    "biases": dt.Union(methods=(dt.LoRA(targets=dt.Part("q", "v")), dt.BitFit())),
    "some biases": dt.Union(methods=(dt.DoRA(targets=dt.Part("up")), dt.BitFit(targets=dt.Part("up", "down")))),
    "adalora biases": dt.Union(methods=(dt.AdaLoRA(targets=dt.Part("o")), dt.BitFit())),
}
CASES = [(f, m) for f in FAMILIES for m in METHODS] + [(f, m) for f in BIASED for m in BIASES]


@pytest.mark.parametrize("family,name", CASES)
def test_peft_computes_what_we_wrote(family, name, tmp_path):
    net = base(family)
    given = inputs(net)
    want, plain = saved(net, (METHODS | BIASES)[name], tmp_path / "a")
    theirs = from_peft(base(family), tmp_path / "a")
    close(outputs(theirs, given), want)
    ours = base(family)
    dt.load(ours, tmp_path / "a")
    close(outputs(ours, given), want)
    dt.detach(ours)
    close(outputs(ours, given), plain, atol=0)
    theirs.save_pretrained(tmp_path / "b")
    dt.load(ours, tmp_path / "b")
    close(outputs(ours, given), want)


HEADS = [
    ("bert", "classification"), ("llama", "classification"), ("roberta", "classification"), ("gpt2", "tokens"),
    ("distilbert", "classification"), ("bert", "tokens"), ("t5", "classification"), ("opt", "classification"),
]  # fmt: skip


@pytest.mark.parametrize("family,task", HEADS)
@pytest.mark.parametrize("tuned", [False, True])
def test_a_classification_head_is_saved_when_it_is_trained(family, task, tuned, tmp_path):
    net = base(family, task)
    given = inputs(net)
    lora = dt.LoRA(r=2)
    want, _ = saved(net, dt.Union(methods=(lora, dt.Tune())) if tuned else lora, tmp_path)
    config = config_of(tmp_path)
    assert config["task_type"] in (("SEQ_CLS", "TOKEN_CLS") if tuned else (None,))
    assert bool(config["modules_to_save"]) is tuned
    close(outputs(from_peft(base(family, task), tmp_path), given), want)
    again = base(family, task)
    method = dt.load(again, tmp_path).method
    close(outputs(again, given), want)
    assert isinstance(method, dt.Union) is tuned


def test_low_rank_on_a_head_is_no_copy_of_it(tmp_path):
    net = base("bert", "classification")
    given = inputs(net)
    want, _ = saved(net, dt.LoRA(targets=("query", "classifier"), r=2), tmp_path)
    assert config_of(tmp_path)["target_modules"][-1] == "classifier"
    close(outputs(from_peft(base("bert", "classification"), tmp_path), given), want)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings(family, tied, tmp_path):
    """An adapter of the embedding leaves the head alone, also where both share their weight."""
    make = lambda: base(family, tie_word_embeddings=tied)
    net = make()
    net.tie_weights()
    given = inputs(net)
    both = dt.Union(methods=(dt.LoRA(targets=dt.Part("embedding"), r=2), dt.Tune(targets=dt.Part("head"))))
    want, _ = saved(net, both, tmp_path)
    other = make()
    other.tie_weights()
    close(outputs(from_peft(other, tmp_path), given), want)


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_embeddings_that_scale_their_output(family, tmp_path):
    net = base(family)
    given = inputs(net)
    want, _ = saved(net, dt.LoRA(targets=dt.Part("embedding"), r=2), tmp_path)
    close(outputs(from_peft(base(family), tmp_path), given), want)


class Net(nn.Module):
    """Convolutions and what stands between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(4, 8, 3, padding=1, stride=2)
        self.two = nn.Conv2d(1, 6, (3, 2), padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.two(self.one(x)[:, None])).mean((2, 3)))


@pytest.mark.parametrize(
    "method",
    [
        dt.LoRA(targets=(nn.Conv1d, nn.Conv2d), r=2),
        dt.LoRA(targets="all-layers", r=2, scaling="alpha/sqrt(r)"),
        dt.DoRA(targets=(nn.Conv1d, nn.Conv2d), inner=dt.LoRA(r=2)),
        dt.Union(methods=(dt.LoRA(targets=("one", "two")), dt.Tune(targets="head"))),
        dt.IA3(targets=("two", "head"), on_input=None),
    ],
    ids=["lora", "rslora", "dora", "tune", "ia3"],
)
def test_convolutions(method, tmp_path):
    net, x = Net(), torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(3))
    adapter = dt.attach(net, method)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
        want = net(x)
        assert (want - Net()(x)).abs().max() > 1e-2
        adapter.save(tmp_path)
        assert config_of(tmp_path)["deltatune"]["tensors"] == "peft"
        close(from_peft(Net(), tmp_path)(x), want)
        again = Net()
        dt.load(again, tmp_path)
        close(again(x), want)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, dilation=2),
        nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"),
    ],
    ids=["groups", "dilation", "padding mode"],
)
def test_convolutions_that_peft_computes_otherwise_keep_our_layout(conv, tmp_path):
    adapter = dt.attach(nn.Sequential(conv), dt.LoRA(targets="0", r=2))
    adapter.save(tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "deltatune"


@pytest.mark.parametrize(
    "family,method",
    [
        ("gpt2", dt.BitFit()),
        ("gpt2", dt.Tune()),
        ("gpt2", dt.Houlsby()),
        ("gpt2", dt.Union(methods=(dt.LoRA(), dt.IA3()))),
        ("gpt2", dt.Union(methods=(dt.IA3(), dt.BitFit()))),
        ("gpt2", dt.Union(methods=(dt.LoRA(targets="c_proj"), dt.Tune(targets="c_proj")))),
        ("gpt2", dt.IA3(targets=dt.Part("q", "v"), on_input=dt.Part("q", "v"))),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_peft_has_no_words_for_keeps_our_layout(family, method, tmp_path):
    net = base(family)
    given = inputs(net)
    adapter = dt.attach(net, method)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01)
    want = outputs(net, given)
    adapter.save(tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "deltatune"
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), want)


def test_an_embedding_that_computes_its_own_index_keeps_our_layout(tmp_path):
    """OPT's positions are given a mask; PEFT's LoRA would look the mask up."""
    dt.attach(base("opt"), dt.LoRA(targets="embed_positions", r=2)).save(tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "deltatune"


def test_the_configuration_has_the_fields_that_peft_writes(tmp_path):
    pairs = (dt.LoRA(), peft.LoraConfig), (dt.IA3(), peft.IA3Config), (dt.AdaLoRA(), peft.AdaLoraConfig)
    for method, peft_type in pairs:
        dt.attach(base("gpt2"), method).save(tmp_path / "ours")
        given = {"total_step": 9} if peft_type is peft.AdaLoraConfig else {}
        given |= {"feedforward_modules": []} if peft_type is peft.IA3Config else {}
        theirs = peft.get_peft_model(base("gpt2"), peft_type(target_modules=["c_attn"], **given))
        theirs.save_pretrained(tmp_path / "theirs")
        assert config_of(tmp_path / "ours").keys() - {"deltatune"} == config_of(tmp_path / "theirs").keys()
        assert tensors_of(tmp_path / "theirs").keys() <= tensors_of(tmp_path / "ours").keys()
        assert config_of(tmp_path / "ours")["fan_in_fan_out"] is True
        assert config_of(tmp_path / "ours")["inference_mode"] is True


def test_targets_are_whole_paths_and_peft_finds_just_these(tmp_path):
    adapter = dt.attach(base("llama"), dt.LoRA(targets=dt.Layers(targets=dt.Part("q", "down"), start=1, stop=2)))
    adapter.save(tmp_path)
    paths = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert config_of(tmp_path)["target_modules"] == paths
    assert sorted(from_peft(base("llama"), tmp_path).targeted_module_names) == paths
    assert dt.load(base("llama"), tmp_path).method.r == 8


def test_a_wrong_scaling_in_the_file_is_seen(tmp_path):
    net = base("llama")
    given = inputs(net)
    want, _ = saved(net, dt.LoRA(ranks={"q_proj": 2}, alphas={"q_proj": 5}), tmp_path)
    edit(tmp_path, alpha_pattern={})
    for other in (from_peft(base("llama"), tmp_path), base("llama")):
        if not isinstance(other, peft.PeftModel):
            dt.load(other, tmp_path)
        with pytest.raises(AssertionError):
            close(outputs(other, given), want)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 6),
    alpha=st.floats(0.25, 32, width=32),
    root=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "k_proj", r"layers\.1\..*v_proj", "o_proj"]), st.integers(1, 5)),
    alphas=st.dictionaries(st.sampled_from(["q_proj", r"layers\.0.*", "down_proj"]), st.floats(0.5, 9, width=32)),
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "embed_tokens"]), min_size=1),
)
def test_ranks_and_alphas_of_every_module_survive(r, alpha, root, ranks, alphas, targets, tmp_path):
    scaling = "alpha/sqrt(r)" if root else "alpha/r"
    method = dt.LoRA(targets=tuple(targets), r=r, alpha=alpha, scaling=scaling, ranks=ranks, alphas=alphas)
    net = base("llama")
    given = inputs(net)
    want, _ = saved(net, method, tmp_path)
    close(outputs(from_peft(base("llama"), tmp_path), given), want, atol=3e-5)
    again = base("llama")
    dt.load(again, tmp_path)
    close(outputs(again, given), want, atol=3e-5)


def test_the_file_is_plain_json_with_whole_numbers_for_alpha(tmp_path):
    dt.attach(base("llama"), dt.LoRA(r=6, alpha=7, scaling="alpha/sqrt(r)")).save(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(text)["lora_alpha"] == 7 and '"lora_alpha": 7,' in text


def test_reading_a_file_does_not_walk_through_the_adapters_that_are_there(tmp_path):
    model = base("llama")
    before = dict(_aliases(model))
    for i in range(3):
        dt.attach(model, dt.LoRA(r=2), f"a{i}")
    assert dict(_aliases(model)) == before
    assert {*model.named_modules(remove_duplicate=False)} > before.items()
