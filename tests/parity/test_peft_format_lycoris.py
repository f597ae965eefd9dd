"""LoHa and LoKr in PEFT's layout, both ways: outputs against PEFT 0.21.2 itself."""

import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig
from peft_pairs import (
    base,
    close,
    config_of,
    edit,
    from_peft,
    outputs,
    perturb,
    save_peft,
    saved,
    tensors_of,
    write_tensors,
)
from torch import nn

import deltatune as dt
from deltatune.interop.peft_format_lycoris import parts_of
from deltatune.models.tiny import inputs

METHODS = {
    "loha": dt.LoHa(r=3),
    "loha everywhere": dt.LoHa(r=2, alpha=5, targets="all-linear"),
    "loha, ranks apart": dt.Union(
        methods=(dt.LoHa(r=2, targets=dt.Part("q")), dt.LoHa(r=4, alpha=3, targets=dt.Part("down")))
    ),
    "loha head": dt.Union(methods=(dt.LoHa(), dt.Tune())),
    "lokr": dt.LoKr(r=2, targets="all-linear"),
    "lokr whole": dt.LoKr(r=16, alpha=4, targets="all-linear"),
    "lokr both": dt.LoKr(r=2, factor=4, decompose=("w1", "w2"), targets=dt.Part("q", "down")),
    "lokr both, one part each": dt.LoKr(r=1, alpha=2, decompose=("w1", "w2"), targets="all-linear"),
    "lokr none": dt.LoKr(r=9, factor=4, decompose=(), targets=dt.Part("q")),
    "lokr, ranks apart": dt.Union(
        methods=(dt.LoKr(r=2, targets=dt.Part("q")), dt.LoKr(r=1, alpha=3, targets=dt.Part("down")))
    ),
    "lokr head": dt.Union(methods=(dt.LoKr(r=2, targets="all-linear"), dt.Tune())),
}
CASES = [(f, m) for f in ("llama", "t5") for m in METHODS] + [("bloom", "loha"), ("bert", "loha"), ("bert", "lokr")]


@pytest.mark.parametrize("family,name", CASES)
def test_peft_computes_what_we_wrote(family, name, tmp_path):
    net = base(family)
    given = inputs(net)
    want, plain = saved(net, METHODS[name], tmp_path / "a")
    theirs = from_peft(base(family), tmp_path / "a")
    close(outputs(theirs, given), want)
    ours = base(family)
    adapter = dt.load(ours, tmp_path / "a")
    close(outputs(ours, given), want)
    if family != "bloom" and "none" not in name:
        known = ("r", "alpha", "factor", "decompose")
        pairs = [[{k: v for k, v in vars(p).items() if k in known} for p in m.parts() if type(p) is not dt.Tune]
                 for m in (METHODS[name], adapter.method)]  # fmt: skip
        assert sorted(pairs[0], key=lambda p: p["r"]) == sorted(pairs[1], key=lambda p: p["r"])
    dt.detach(ours)
    close(outputs(ours, given), plain, atol=0)
    theirs.save_pretrained(tmp_path / "b")
    dt.load(ours, tmp_path / "b")
    close(outputs(ours, given), want)


def test_rows_of_a_fused_projection_become_one_product(tmp_path):
    net = base("bloom")
    given = inputs(net)
    parts = dt.LoHa(r=2, alpha=3, targets=dt.Part("q")), dt.LoHa(r=3, targets=dt.Part("v"))
    want, _ = saved(net, dt.Union(methods=parts), tmp_path)
    assert config_of(tmp_path)["r"] == 5
    close(outputs(from_peft(base("bloom"), tmp_path), given), want)
    again = base("bloom")
    dt.load(again, tmp_path)
    close(outputs(again, given), want)


ATTENTION = {"llama": ["q_proj", "v_proj"], "t5": ["q", "v"], "bert": ["query", "value"], "bloom": ["query_key_value"]}
CONFIGS = {
    "loha": lambda t: LoHaConfig(target_modules=t, init_weights=False),
    "loha scaled": lambda t: LoHaConfig(target_modules=t, r=3, alpha=5),
    "loha patterns": lambda t: LoHaConfig(target_modules=t, r=3, rank_pattern={t[0]: 2}, alpha_pattern={t[-1]: 4}),
    "loha everywhere": lambda t: LoHaConfig(target_modules="all-linear", r=2, alpha=1),
    "lokr": lambda t: LoKrConfig(target_modules=t, init_weights=False),
    "lokr scaled": lambda t: LoKrConfig(target_modules=t, r=2, alpha=5),
    "lokr patterns": lambda t: LoKrConfig(target_modules=t, r=2, rank_pattern={t[0]: 1}, alpha_pattern={t[-1]: 4}),
    "lokr both": lambda t: LoKrConfig(target_modules=t, r=1, decompose_both=True, decompose_factor=4),
    "lokr factor": lambda t: LoKrConfig(target_modules=t, r=2, decompose_factor=2),
    "lokr factor that divides nothing": lambda t: LoKrConfig(target_modules=t, r=2, decompose_factor=3),
    "lokr everywhere": lambda t: LoKrConfig(target_modules="all-linear", r=2, init_weights="lycoris"),
}


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "bloom"])
@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_peft_wrote(family, name, tmp_path):
    net = base(family)
    given = inputs(net)
    _, want = save_peft(net, CONFIGS[name](ATTENTION[family]), tmp_path)
    again = base(family)
    assert (outputs(again, given) - want).abs().max() > 1e-4
    adapter = dt.load(again, tmp_path)
    close(outputs(again, given), want)
    adapter.save(tmp_path / "back")
    assert config_of(tmp_path / "back")["deltatune"]["tensors"] == "peft"
    close(outputs(from_peft(base(family), tmp_path / "back"), given), want)
    there, back = tensors_of(tmp_path), tensors_of(tmp_path / "back")
    assert there.keys() == back.keys() and all(torch.equal(back[k], t) for k, t in there.items())


class Net(nn.Module):
    """Convolutions and a linear layer."""

    def __init__(self, one=1, mode="zeros"):
        super().__init__()
        torch.manual_seed(0)
        self.channels = one
        self.one = nn.Conv1d(4, 8, 3, padding=1, stride=2, padding_mode=mode)
        self.two = nn.Conv2d(one, 6 * one, (3, 2), padding=1, groups=one, dilation=one)
        self.three = nn.Conv2d(6 * one, 12, 1)
        self.head = nn.Linear(12, 6)

    def forward(self, x):
        h = self.one(x)[:, None].repeat(1, self.channels, 1, 1)
        return self.head(torch.relu(self.three(self.two(h))).mean((2, 3)))


ALL = ["one", "two", "three", "head"]
X = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(3))


def _saved_by_peft(net, config, folder):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).eval()
        perturb((p for p in model.parameters() if p.requires_grad), 0.2)
        model.save_pretrained(folder)
        return model(X)


@pytest.mark.parametrize("config,channels", [
    (LoHaConfig(target_modules=ALL, r=2), 1),
    (LoHaConfig(target_modules=ALL, r=2), 2),
    (LoHaConfig(target_modules=ALL, r=3, alpha=2, use_effective_conv2d=True), 1),
    (LoKrConfig(target_modules=ALL, r=1), 1),
    (LoKrConfig(target_modules=["two", "three", "head"], r=4, alpha=2), 1),
    (LoKrConfig(target_modules=["two", "three", "head"], r=1, use_effective_conv2d=True, decompose_both=True), 2),
    (LoKrConfig(target_modules=["two", "head"], r=1, alpha=2, use_effective_conv2d=True), 1),
], ids=["loha", "loha groups", "loha core", "lokr", "lokr whole", "lokr core, groups", "lokr core"])  # fmt: skip
def test_convolutions(config, channels, tmp_path):
    want = _saved_by_peft(Net(channels), config, tmp_path)
    net = Net(channels)
    with torch.no_grad():
        assert (want - net(X)).abs().max() > 1e-3
        adapter = dt.load(net, tmp_path)
        close(net(X), want)
        adapter.save(tmp_path / "back")
        assert config_of(tmp_path / "back")["deltatune"]["tensors"] == "peft"
        close(from_peft(Net(channels), tmp_path / "back")(X), want)


def test_the_configuration_has_the_fields_that_peft_writes(tmp_path):
    for method, config in ((dt.LoHa(r=2), LoHaConfig), (dt.LoKr(r=2), LoKrConfig)):
        folders = tmp_path / f"{config.__name__}.ours", tmp_path / f"{config.__name__}.theirs"
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        dt.attach(base("llama"), method).save(folders[0])
        save_peft(base("llama"), config(target_modules=targets, r=2), folders[1])
        ours, theirs = map(config_of, folders)
        assert ours.keys() - {"deltatune"} == theirs.keys()
        assert {k for k, v in theirs.items() if ours[k] != v} <= {
            "target_modules", "task_type", "auto_mapping", "base_model_name_or_path", "alpha"
        }  # fmt: skip
        shapes = [{k: t.shape for k, t in tensors_of(folder).items()} for folder in folders]
        assert shapes[0] == shapes[1]


OURS = {
    "a layer that stores (in, out)": ("gpt2", dt.LoHa(targets="c_attn")),
    "a LoKr of such a layer": ("gpt2", dt.LoKr(targets="c_attn")),
    "an embedding": ("llama", dt.LoHa(targets=dt.Part("embedding"))),
    "rows of a fused projection": ("bloom", dt.LoKr(targets=dt.Part("q"))),
    "two products of the same rows": ("llama", dt.Union(methods=(dt.LoHa(), dt.LoHa(r=2)))),
    "a whole w2 that PEFT would split": ("llama", dt.LoKr(r=1, decompose=(), targets=dt.Part("q"))),
    "factors apart": ("llama", dt.Union(
        methods=(dt.LoKr(r=1, factor=2, targets=dt.Part("q")), dt.LoKr(r=1, factor=4, targets=dt.Part("v"))))),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_what_peft_cannot_express_keeps_our_layout(name, tmp_path):
    family, method = OURS[name]
    net = base(family)
    given = inputs(net)
    adapter = dt.attach(net, method)
    perturb(adapter.parameters())
    adapter.save(tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "deltatune"
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), outputs(net, given), atol=0)


@pytest.mark.parametrize("method", [dt.LoHa(targets="one"), dt.LoKr(targets="one", r=1)], ids=["loha", "lokr"])
def test_convolutions_that_peft_computes_otherwise_keep_our_layout(method, tmp_path):
    dt.attach(Net(mode="circular"), method).save(tmp_path)
    assert config_of(tmp_path)["deltatune"]["tensors"] == "deltatune"


def test_a_whole_kernel_in_one_dimension_is_no_kronecker_product_in_peft(tmp_path):
    config = LoKrConfig(target_modules=["one"], r=8)
    want = _saved_by_peft(Net(), config, tmp_path)
    with pytest.raises(
        dt.DeltatuneError, match=r"one: PEFT's LoKr of a Conv1d with lokr_w2 whole \(r = 8\).*r below 2"
    ):
        dt.load(Net(), tmp_path)
    net, tensors = Net(), tensors_of(tmp_path)
    w1, w2 = (tensors[f"base_model.model.one.lokr_{n}"] for n in ("w1", "w2"))
    with torch.no_grad():
        net.one.weight += torch.kron(w1[..., None], w2)
        assert (net(X) - want).abs().max() > 1e-3
    dt.attach(Net(), dt.LoKr(targets="one")).save(tmp_path / "ours")
    assert config_of(tmp_path / "ours")["deltatune"]["tensors"] == "deltatune"


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_gpt2_is_refused_as_peft_does(config, tmp_path):
    with pytest.raises(TypeError, match="not supported"):
        peft.get_peft_model(base("gpt2"), config(target_modules=["c_attn"]))
    save_peft(base("llama"), config(target_modules=["q_proj"]), tmp_path)
    layer = "model.layers.0.self_attn.q_proj"
    own = {k.replace(layer, "transformer.h.0.attn.c_attn"): t for k, t in tensors_of(tmp_path).items() if layer in k}
    write_tensors(tmp_path, own)
    with pytest.raises(dt.DeltatuneError, match="h.0.attn.c_attn: PEFT's Lo.. of this Conv1D is not supported"):
        dt.load(base("gpt2"), tmp_path)


def test_a_factor_that_is_the_larger_part_is_refused(tmp_path):
    save_peft(base("llama"), LoKrConfig(target_modules=["q_proj"], r=2, decompose_factor=8), tmp_path)
    net = base("llama")
    with pytest.raises(dt.DeltatuneError, match=r"q_proj: decompose_factor = 8 splits 32 into \(8, 4\).*up to 5"):
        dt.load(net, tmp_path)
    assert not dt.adapters(net)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("field", ["rank_dropout", "module_dropout"])
def test_a_dropout_that_is_not_kept_is_told(config, field, tmp_path):
    save_peft(base("llama"), config(target_modules=["q_proj"], **{field: 0.1}), tmp_path)
    with pytest.warns(UserWarning, match=f"{field} = 0.1"):
        dt.load(base("llama"), tmp_path)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED = {
    "no w2_b": (LoHaConfig, {f"{LAYER}.hada_w2_b": None}, "hada_w2_b is missing"),
    "a rank": (LoHaConfig, {f"{LAYER}.hada_w1_b": torch.zeros(3, 32)}, "hada_w1_b has rank 3, not r = 2"),
    "a shape": (LoHaConfig, {f"{LAYER}.hada_w1_b": torch.zeros(2, 31)}, "has shape"),
    "strange": (LoHaConfig, {f"{LAYER}.hada_w3": torch.zeros(3)}, "hada_w3"),
    "no lokr_w2_b": (LoKrConfig, {f"{LAYER}.lokr_w2_b": None}, "lokr_w2 is missing"),
    "no lokr_w1": (LoKrConfig, {f"{LAYER}.lokr_w1": None}, "lokr_w1 is missing"),
    "a lokr rank": (LoKrConfig, {f"{LAYER}.lokr_w2_b": torch.zeros(1, 8)}, "lokr_w2_b has rank 1, not r = 2"),
    "both": (LoKrConfig, {f"{LAYER}.lokr_w2": torch.zeros(8, 8)}, "missing|unknown"),
    "strange lokr": (LoKrConfig, {f"{LAYER}.lokr_w3": torch.zeros(3)}, "lokr_w3"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name, tmp_path):
    config, change, words = DAMAGED[name]
    save_peft(base("llama"), config(target_modules=["q_proj"], r=2), tmp_path)
    write_tensors(tmp_path, {k: t for k, t in (tensors_of(tmp_path) | change).items() if t is not None})
    net = base("llama")
    with pytest.raises(dt.DeltatuneError, match=words):
        dt.load(net, tmp_path)
    assert not dt.adapters(net)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_a_wrong_scaling_in_the_file_is_seen(config, tmp_path):
    _, want = save_peft(base("llama"), config(target_modules=["q_proj"], r=2, alpha=3), tmp_path)
    edit(tmp_path, alpha=2)
    net = base("llama")
    dt.load(net, tmp_path)
    with pytest.raises(AssertionError):
        close(outputs(net, inputs(net)), want)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 600), factor=st.integers(-1, 600).filter(bool))
def test_the_split_is_that_of_peft(n, factor):
    from peft.tuners.lokr.layer import factorization

    assert parts_of(n, factor) == factorization(n, factor)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([dt.LoHa, dt.LoKr]),
    r=st.integers(1, 5),
    alpha=st.floats(0.25, 32, width=32),
    factor=st.sampled_from([-1, 1, 2, 3, 4]),
    both=st.booleans(),
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "down_proj"]), min_size=1),
)
def test_any_rank_and_alpha_survives(kind, r, alpha, factor, both, targets, tmp_path):
    own = {"factor": factor, "decompose": ("w1", "w2") if both else ("w2",)} if kind is dt.LoKr else {}
    net = base("llama")
    given = inputs(net)
    want, _ = saved(net, kind(targets=tuple(targets), r=r, alpha=alpha, **own), tmp_path)
    close(outputs(from_peft(base("llama"), tmp_path), given), want, atol=3e-5)
    again = base("llama")
    dt.load(again, tmp_path)
    close(outputs(again, given), want, atol=3e-5)
