"""What PEFT wrote, we compute with the same outputs, or refuse with the field's name."""

import json
import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoraConfig, TrainableTokensConfig
from peft_pairs import base, close, config_of, edit, from_peft, outputs, perturb, save_peft, tensors_of, write_tensors
from torch import nn

import deltatune as dt
from deltatune.models.tiny import inputs

FAMILIES = ["llama", "gpt2", "bloom", "bert", "t5", "opt"]
ATTENTION = {
    "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bloom": ["query_key_value"], "bert": ["query", "value"],
    "t5": ["q", "v"], "opt": ["q_proj", "v_proj"],
}  # fmt: skip
EMBEDDING = {
    "llama": "embed_tokens", "gpt2": "wte", "bloom": "word_embeddings", "bert": "word_embeddings", "t5": "embed_tokens",
    "opt": "embed_tokens",
}  # fmt: skip
NORM = {
    "llama": "input_layernorm", "gpt2": "ln_1", "bloom": "input_layernorm", "bert": "LayerNorm", "t5": "layer_norm",
    "opt": "self_attn_layer_norm",
}  # fmt: skip
TASK = dict.fromkeys(FAMILIES, "CAUSAL_LM") | {"t5": "SEQ_2_SEQ_LM", "bert": None}
DOWN = {
    "llama": "down_proj", "gpt2": "mlp.c_proj", "bloom": "dense_4h_to_h", "bert": "output.dense", "t5": "wo",
    "opt": "fc2",
}  # fmt: skip
CONFIGS = {
    "lora": lambda f: LoraConfig(target_modules=ATTENTION[f]),
    "task": lambda f: LoraConfig(target_modules=ATTENTION[f], task_type=TASK[f]),
    "all-linear": lambda f: LoraConfig(target_modules="all-linear", r=3, lora_alpha=7, use_rslora=True),
    "default targets": lambda f: LoraConfig(),
    "pattern": lambda f: LoraConfig(target_modules=rf".*\.({'|'.join(ATTENTION[f])})"),
    "one layer": lambda f: LoraConfig(target_modules=ATTENTION[f], layers_to_transform=[0]),
    "dora": lambda f: LoraConfig(target_modules=ATTENTION[f], use_dora=True, r=3),
    "embedding": lambda f: LoraConfig(target_modules=[EMBEDDING[f], ATTENTION[f][0]], r=3),
    "dora embedding": lambda f: LoraConfig(target_modules=[EMBEDDING[f]], use_dora=True, r=3),
    "modules": lambda f: LoraConfig(target_modules=ATTENTION[f], modules_to_save=[NORM[f], EMBEDDING[f]]),
    "biases": lambda f: LoraConfig(target_modules=ATTENTION[f], bias="all"),
    "its biases": lambda f: LoraConfig(target_modules=ATTENTION[f], bias="lora_only"),
    "pissa": lambda f: LoraConfig(target_modules=ATTENTION[f], init_lora_weights="pissa", r=3, lora_alpha=5),
    "gaussian": lambda f: LoraConfig(target_modules=ATTENTION[f], init_lora_weights="gaussian"),
    "ia3": lambda f: IA3Config(target_modules=[*ATTENTION[f], DOWN[f]], feedforward_modules=[DOWN[f]]),
    "ia3 modules": lambda f: IA3Config(
        target_modules=ATTENTION[f], feedforward_modules=ATTENTION[f], modules_to_save=[NORM[f]]
    ),
    "adalora": lambda f: AdaLoraConfig(target_modules=ATTENTION[f], init_r=5, target_r=2, total_step=9, lora_alpha=40),
    "tokens": lambda f: LoraConfig(target_modules=ATTENTION[f], trainable_token_indices={EMBEDDING[f]: [7, 3, 50]}),
    "tokens alone": lambda f: TrainableTokensConfig(target_modules=[EMBEDDING[f]], token_indices=[7, 3, 50]),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_peft_wrote(family, name, tmp_path):
    given = inputs(base(family))
    plain = outputs(base(family), given)
    _, want = save_peft(base(family), CONFIGS[name](family), tmp_path)
    assert (want - plain).abs().max() > 1e-4
    net = base(family)
    dt.load(net, tmp_path)
    if family == "bert" and "tokens" in name:  # of a head tied to trained tokens PEFT 0.21.2 leaves the bias out
        want = want + net.cls.predictions.decoder.bias
    close(outputs(net, given), want, atol=5e-5 if name == "pissa" else 1e-5)
    dt.detach(net)
    close(outputs(net, given), plain, atol=0)


HEADS = [
    ("bert", "classification", "SEQ_CLS"), ("roberta", "classification", "SEQ_CLS"),
    ("opt", "classification", "SEQ_CLS"), ("distilbert", "classification", "SEQ_CLS"),
    ("bert", "tokens", "TOKEN_CLS"), ("gpt2", "tokens", "TOKEN_CLS"),
]  # fmt: skip


@pytest.mark.parametrize("family,task,kind", HEADS)
def test_heads_that_peft_trains_unasked(family, task, kind, tmp_path):
    config = LoraConfig(task_type=kind, target_modules=["query", "q_lin", "q_proj", "c_attn"])
    _, want = save_peft(base(family, task), config, tmp_path)
    net = base(family, task)
    adapter = dt.load(net, tmp_path)
    assert any(type(part) is dt.Tune for part in adapter.method.parts())
    close(outputs(net, inputs(net)), want)


def test_olora(tmp_path):
    _, want = save_peft(base("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights="olora", r=4), tmp_path)
    net = base("llama")
    dt.load(net, tmp_path)
    close(outputs(net, inputs(net)), want)


def test_pissa_with_patterns_and_root_scaling(tmp_path):
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", r=4, use_rslora=True,
        rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.*q_proj": 3},
    )  # fmt: skip
    _, want = save_peft(base("llama"), config, tmp_path)
    net = base("llama")
    dt.load(net, tmp_path)
    close(outputs(net, inputs(net)), want, atol=5e-5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(4, 8, 3, padding=1, stride=2)
        self.two = nn.Conv2d(1, 6, (3, 2), padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.two(self.one(x)[:, None])).mean((2, 3)))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["one", "two"], r=2),
        LoraConfig(target_modules=["two"], r=2, use_dora=True, modules_to_save=["head"]),
        LoraConfig(target_modules=["one"], r=2, use_dora=True),
        LoraConfig(target_modules=["one", "head"], r=2, bias="all"),
        IA3Config(target_modules=["two", "head"], feedforward_modules=["head"]),
        IA3Config(target_modules=["two", "head"], feedforward_modules=["two"]),
    ],
    ids=["lora", "dora", "dora 1d", "biases", "ia3", "ia3 inputs"],
)
def test_convolutions(config, tmp_path):
    x = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), config).eval()
        perturb((p for p in model.parameters() if p.requires_grad), 0.2)
        model.save_pretrained(tmp_path)
        want = model(x)
        net = Net()
        assert (want - net(x)).abs().max() > 1e-3
        dt.load(net, tmp_path)
        close(net(x), want)


def test_adalora_after_its_ranks_were_allocated(tmp_path):
    net = base("gpt2")
    given = inputs(net)
    config = AdaLoraConfig(target_modules=["c_attn", "c_fc"], init_r=5, target_r=2, total_step=9, lora_alpha=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).eval()
        perturb(p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_E" in name:
                    p[1::2] = 0.0
        kept = [True, False, True, False, True]
        names = [n for n, _ in model.base_model.model.named_parameters() if "lora_E" in n]
        model.peft_config["default"].rank_pattern = dict.fromkeys(names, kept)
        want = outputs(model, given)
        model.save_pretrained(tmp_path)
    assert {len(t) for k, t in tensors_of(tmp_path).items() if "lora_E" in k} == {3}
    again = base("gpt2")
    adapter = dt.load(again, tmp_path)
    close(outputs(again, given), want)
    assert adapter.method.init_r == 5 and adapter.method.target_r == 2
    adapter.save(tmp_path / "back")
    close(outputs(from_peft(base("gpt2"), tmp_path / "back"), given), want)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 6),
    alpha=st.integers(1, 40),
    root=st.booleans(),
    dora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "layers.1.self_attn.v_proj", r"layers\.0.*"]), st.integers(1, 5)),
    alphas=st.dictionaries(st.sampled_from(["v_proj", "^model.layers.1.self_attn.q_proj"]), st.integers(1, 9)),
    targets=st.sets(st.sampled_from(["q_proj", "v_proj", "embed_tokens", "down_proj"]), min_size=1),
)
def test_any_pattern(r, alpha, root, dora, ranks, alphas, targets, tmp_path):
    assume(not {"q_proj", r"layers\.0.*"} <= ranks.keys())  # PEFT sorts them when it saves: which came first is lost
    config = LoraConfig(
        r=r, lora_alpha=alpha, use_rslora=root, use_dora=dora, rank_pattern=ranks, alpha_pattern=alphas,
        target_modules=targets,
    )  # fmt: skip
    _, want = save_peft(base("llama"), config, tmp_path)
    net = base("llama")
    dt.load(net, tmp_path)
    close(outputs(net, inputs(net)), want, atol=3e-5)


def test_an_older_file_lacks_most_fields(tmp_path):
    _, want = save_peft(base("llama"), LoraConfig(target_modules=["q_proj"], r=8, lora_alpha=8), tmp_path)
    edit(tmp_path, **dict.fromkeys(config_of(tmp_path).keys() - {"peft_type", "target_modules"}, ...))
    net = base("llama")
    dt.load(net, tmp_path)
    close(outputs(net, inputs(net)), want)


def test_the_tensors_say_which_modules_not_the_configuration(tmp_path):
    _, want = save_peft(base("llama"), LoraConfig(target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, target_modules=None)
    net = base("llama")
    adapter = dt.load(net, tmp_path)
    close(outputs(net, inputs(net)), want)
    assert adapter.method.targets == "q_proj"
    assert adapter.name == "default"


def test_base_weights_in_the_file_replace_the_bases_own_and_what_is_tied_to_them(tmp_path):
    """PEFT writes the embedding whole when the adapter targets it, and reads it into the base."""
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2)
    model, _ = save_peft(base("opt"), config, tmp_path)
    tensors = tensors_of(tmp_path)
    key = next(k for k in tensors if k.endswith("embed_tokens.base_layer.weight"))
    write_tensors(tmp_path, tensors | {key: tensors[key] * 1.5})
    net = base("opt")
    given = inputs(net)
    assert net.lm_head.weight is net.model.decoder.embed_tokens.weight
    want = outputs(from_peft(base("opt"), tmp_path), given)
    assert (want - outputs(model, given)).abs().max() > 1e-2
    dt.load(net, tmp_path)
    close(outputs(net, given), want)


def test_a_dropout_rate_is_kept(tmp_path):
    save_peft(base("llama"), LoraConfig(target_modules=["q_proj"], lora_dropout=0.25), tmp_path)
    assert dt.load(base("llama"), tmp_path).method.dropout == 0.25


REFUSED = {
    "layer_replication": [[0, 2]], "target_parameters": ["x"], "use_qalora": True, "velora_config": {"scale": 1.0},
    "kasa_config": {"beta": 1.0}, "monteclora_config": {"num_samples": 2}, "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3}, "alora_invocation_tokens": [3], "lora_bias": True, "megatron_config": {"a": 1},
    "ensure_weight_tying": True, "init_lora_weights": "pissa_niter_4",
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_change_the_maths_are_refused_by_name(field, tmp_path):
    save_peft(base("gpt2"), LoraConfig(target_modules=["c_attn"]), tmp_path)
    edit(tmp_path, **{field: REFUSED[field]})
    net = base("gpt2")
    with pytest.raises(dt.DeltatuneError, match=field):
        dt.load(net, tmp_path)
    assert not dt.adapters(net)


def test_unknown_fields_are_told_and_ours_are_not(tmp_path):
    dt.attach(base("llama"), dt.LoRA()).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dt.load(base("llama"), tmp_path)
    edit(tmp_path, use_magic=True, quiet=None)
    with pytest.warns(UserWarning, match="use_magic") as told:
        dt.load(base("llama"), tmp_path)
    assert "quiet" not in str(told[0].message)


@pytest.mark.parametrize("kind,near", [("LORRA", "'LORA'"), ("XLORA", "'LORA'"), ("POLY", "LORA"), ("", "LORA")])
def test_other_methods_are_refused_with_those_that_are_read(kind, near, tmp_path):
    dt.attach(base("llama"), dt.LoRA()).save(tmp_path)
    edit(tmp_path, peft_type=kind)
    with pytest.raises(dt.DeltatuneError, match=f"peft_type '{kind}'.*{near}"):
        dt.load(base("llama"), tmp_path)


def test_damaged_files(tmp_path):
    save_peft(base("llama"), LoraConfig(target_modules=["q_proj"], r=4), tmp_path)
    tensors = tensors_of(tmp_path)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    cases = [
        ({f"{path}.lora_B.weight": None}, "lora_B is missing"),
        ({f"{path}.lora_A.weight": torch.zeros(5, 32)}, "rank 5, not r = 4"),
        ({f"{path}.lora_A.weight": torch.zeros(4, 31)}, "has shape"),
        ({f"{path}.strange": torch.zeros(4)}, "strange"),
        ({"base_model.model.model.layers.0.self_atn.q_proj.lora_A.weight": torch.zeros(4, 32)}, "self_attn"),
        ({"base_model.model.model.embed_tokens.weight": torch.zeros(101, 32)}, "resize_token_embeddings"),
        (dict.fromkeys(tensors), "no LoRA tensors"),
    ]
    for change, message in cases:
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        write_tensors(tmp_path, changed or {"base_model.model.lm_head.weight": base("llama").lm_head.weight.detach()})
        net = base("llama")
        with pytest.raises(dt.DeltatuneError, match=message):
            dt.load(net, tmp_path)
        assert not dt.adapters(net)


def test_a_base_in_half_precision(tmp_path):
    model, _ = save_peft(base("llama"), LoraConfig(target_modules=["q_proj", "embed_tokens"], r=4), tmp_path)
    net = base("llama").bfloat16()
    adapter = dt.load(net, tmp_path)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert [type(p) for p in adapter.method.parts()] == [dt.LoRA]
    adapter.save(tmp_path / "back")
    written, back = tensors_of(tmp_path), tensors_of(tmp_path / "back")
    assert all(torch.equal(written[k], t) for k, t in back.items())
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["r"] == 4
