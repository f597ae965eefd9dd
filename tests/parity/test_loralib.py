"""loralib's layers with our weights, and its checkpoints loaded: Linear, Embedding, Conv2d, and fused QKV on GPT-2."""

from __future__ import annotations

import copy
import pickle

import loralib
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deltatune as dt
from deltatune.interop.loralib import load_loralib
from deltatune.models.tiny import inputs, tiny


def shake(tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in tensors:
            t.add_(0.3 * torch.randn(t.shape, generator=g))


def shaken(layer):
    """A layer of loralib whose factors are none of them zero, so that none is hidden."""
    shake([layer.lora_A, layer.lora_B])
    layer.eval()  # returns None
    return layer


def plain(module):
    """The layer of torch under a layer of loralib, as it is before anything is merged into it."""
    inner = getattr(module, "conv", module)
    if isinstance(inner, nn.Conv2d):
        made = nn.Conv2d(inner.in_channels, inner.out_channels, inner.kernel_size, inner.stride, inner.padding)
    elif isinstance(inner, nn.Embedding):
        made = nn.Embedding(inner.num_embeddings, inner.embedding_dim)
    else:
        made = nn.Linear(inner.in_features, inner.out_features)
    made.load_state_dict({k: v.clone() for k, v in inner.state_dict().items() if "lora" not in k})
    return made


LAYERS = {
    "linear": (lambda: loralib.Linear(12, 10, r=3, lora_alpha=7, merge_weights=False), lambda: torch.randn(4, 12)),
    "embedding": (
        lambda: loralib.Embedding(9, 5, r=3, lora_alpha=7, merge_weights=False),
        lambda: torch.tensor([[1, 8, 0], [3, 3, 2]]),
    ),
    "conv2d": (
        lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=7, merge_weights=False, stride=2, padding=1),
        lambda: torch.randn(2, 4, 9, 7),
    ),
}


def made(kind):
    torch.manual_seed(0)
    layer, x = LAYERS[kind]
    return shaken(layer()), x()


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_lora_with_loralib_s_weights_gives_its_outputs(kind):
    theirs, x = made(kind)
    net = nn.Sequential(plain(theirs))
    ((_, unit),) = dt.attach(net, dt.LoRA(r=3, alpha=7, targets="0")).units()
    swap = kind == "embedding"
    with torch.no_grad():
        unit.a.copy_(theirs.lora_B.T if swap else theirs.lora_A)
        unit.b.copy_(theirs.lora_A.T if swap else theirs.lora_B)
    torch.testing.assert_close(net(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net(x), plain(theirs)(x), atol=1e-2)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_checkpoint_gives_the_layer_s_outputs_and_merges(kind, tmp_path):
    theirs, x = made(kind)
    torch.save(loralib.lora_state_dict(nn.Sequential(theirs)), tmp_path / "lora.pt")
    net = nn.Sequential(plain(theirs))
    adapter = load_loralib(net, tmp_path / "lora.pt", alpha=7, name="theirs")
    assert adapter.name == "theirs" and isinstance(adapter.method, dt.LoRA)
    torch.testing.assert_close(net(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net(x), plain(theirs)(x), atol=1e-2)
    dt.merge(net)
    torch.testing.assert_close(net(x), theirs(x), atol=1e-5, rtol=1e-5)


def gpt2(enabled, ranks=(4, 4)):
    """(ours, theirs): GPT-2 twice, the second with loralib's fused projection in each block."""
    torch.manual_seed(0)
    ours = tiny("gpt2")
    theirs = copy.deepcopy(ours)
    for block, r in zip(theirs.transformer.h, ranks, strict=True):
        old = block.attn.c_attn
        new = loralib.MergedLinear(*old.weight.shape, r=r, lora_alpha=6, enable_lora=list(enabled),
                                   fan_in_fan_out=True, merge_weights=False)  # fmt: skip
        with torch.no_grad():
            new.weight.copy_(old.weight)
            new.bias.copy_(old.bias)
        block.attn.c_attn = shaken(new)
    return ours, theirs.eval()


FUSED = [(True, False, True), (False, True, False), (True, True, True), (False, True, True)]


@pytest.mark.parametrize("enabled", FUSED, ids=str)
def test_lora_on_q_k_and_v_is_loralib_s_merged_linear_on_a_fused_projection(enabled):
    ours, theirs = gpt2(enabled)
    given = inputs(ours)
    before = ours(**given).logits
    names = [n for n, on in zip("qkv", enabled, strict=True) if on]
    one = dt.Fused(targets="c_attn", sizes=(1, 1, 1), take=tuple("qkv".index(n) for n in names))
    for targets in [one] if len(names) == 3 else [dt.Part(*names), one]:
        adapter = dt.attach(ours, dt.LoRA(r=4, alpha=6, targets=targets))
        number = {}
        for path, _, unit, _ in adapter.sites():
            j = number[path] = number.get(path, -1) + 1
            layer = theirs.get_submodule(path)
            with torch.no_grad():
                unit.inner.a.copy_(layer.lora_A[4 * j : 4 * (j + 1)])
                unit.inner.b.copy_(layer.lora_B[32 * j : 32 * (j + 1)])
        assert sum(p.numel() for p in adapter.parameters()) == 2 * len(names) * 4 * (32 + 32)
        torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours(**given).logits, before, atol=1e-2)
        dt.detach(ours)


@pytest.mark.parametrize("enabled", FUSED, ids=str)
def test_a_checkpoint_of_fused_projections_of_several_ranks(enabled, tmp_path):
    ours, theirs = gpt2(enabled, ranks=(4, 2))
    given = inputs(ours)
    torch.save({"model_state_dict": loralib.lora_state_dict(theirs)}, tmp_path / "lora.pt")
    adapter = load_loralib(ours, tmp_path / "lora.pt", alpha=6, enable_lora=None if all(enabled) else enabled)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=1e-5, rtol=1e-5)
    adapter.save(tmp_path / "ours")
    again = tiny("gpt2")
    again.load_state_dict({k: v for k, v in ours.state_dict().items() if "adapters" not in k.split(".")})
    dt.load(again, tmp_path / "ours")
    torch.testing.assert_close(again(**given).logits, theirs(**given).logits, atol=1e-5, rtol=1e-5)


class Mixed(nn.Module):
    def __init__(self, lora):
        super().__init__()
        torch.manual_seed(0)
        keep = {"merge_weights": False}
        self.embed = loralib.Embedding(9, 12, r=2, lora_alpha=6, **keep) if lora else nn.Embedding(9, 12)
        self.conv = loralib.Conv2d(1, 3, 3, r=1, lora_alpha=6, padding=1, **keep) if lora else nn.Conv2d(1, 3, 3, 1, 1)
        self.fused = (
            loralib.MergedLinear(12, 24, r=2, lora_alpha=6, enable_lora=[False, True], **keep)
            if lora
            else nn.Linear(12, 24)
        )
        self.head = loralib.Linear(24, 5, r=4, lora_alpha=6, **keep) if lora else nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.fused(self.conv(self.embed(x)[:, None]).mean(1)))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_all_layers_of_a_model_at_once_with_the_biases_that_were_trained(bias, prefix, tmp_path):
    theirs, ours = Mixed(lora=True).eval(), Mixed(lora=False)
    names = {k.replace("conv.conv", "conv"): k for k in theirs.state_dict() if "lora" not in k}
    ours.load_state_dict({ours_: theirs.state_dict()[k].clone() for ours_, k in names.items()})
    x = torch.tensor([[1, 8, 0, 4], [3, 3, 2, 7]])
    before = ours(x)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    if bias == "lora_only":  # loralib trains a convolution's bias no more than it saves it
        trained -= {"conv.conv.bias"}
    shake([p for n, p in theirs.named_parameters() if n in trained])
    state = {prefix + k: v for k, v in loralib.lora_state_dict(theirs, bias).items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "lora.safetensors")
    load_loralib(ours, tmp_path / "lora.safetensors", alpha=6, enable_lora=[False, True])
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(x), before, atol=1e-2)
    dt.detach(ours)
    assert torch.equal(ours(x), before)


def test_a_folder_with_a_configuration_is_read_by_load(tmp_path):
    theirs, x = made("linear")
    save_file(loralib.lora_state_dict(nn.Sequential(theirs)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"loralib": {"lora_alpha": 7, "enable_lora": null}}')
    net = nn.Sequential(plain(theirs))
    dt.load(net, tmp_path)
    torch.testing.assert_close(net(x), theirs(x), atol=1e-5, rtol=1e-5)


class Touch:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    net = nn.Sequential(nn.Linear(12, 10))
    bad = tmp_path / "bad.pt"
    torch.save({"0.lora_A": torch.zeros(3, 12), "0.lora_B": torch.zeros(10, 3), "x": Touch(tmp_path / "ran")}, bad)
    with pytest.raises(dt.DeltatuneError, match="bad.pt: not a file of tensors alone"):
        load_loralib(net, bad, alpha=7)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(dt.DeltatuneError, match="raw.pt: not a file of tensors alone"):
        load_loralib(net, tmp_path / "raw.pt", alpha=7)
    assert not (tmp_path / "ran").exists() and not dt.adapters(net)


def broken():
    a, b = torch.zeros(3, 12), torch.zeros(10, 3)
    return {
        "half": ({"0.lora_A": a}, {}, "0: lora_A or lora_B is missing"),
        "nothing": ({"0.weight": b}, {}, "no lora_A in it"),
        "another module": ({"1.lora_A": a, "1.lora_B": b}, {}, "has no module '1'"),
        "another base": ({"0.lora_A": torch.zeros(3, 13), "0.lora_B": b}, {}, r"lora_A \(3, 13\) .* fit this Linear"),
        "untold": ({"0.lora_A": a, "0.lora_B": torch.zeros(5, 3)}, {}, "1 of 2 pieces .* enable_lora=None .* 2 values"),
        "told wrong": (
            {"0.lora_A": a, "0.lora_B": torch.zeros(5, 3)},
            {"enable_lora": [True, True]},
            r"1 of 2 pieces .* enable_lora=\[True, True\]",
        ),
        "merged": ({"0.lora_A": a, "0.lora_B": b, "0.weight": torch.ones(10, 12)}, {}, "its weight is not the base's"),
        "no tensors": ({"0.lora_A": 3}, {}, "not a state dict"),
    }


@pytest.mark.parametrize("what", broken())
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(what, tmp_path):
    state, options, words = broken()[what]
    torch.save(state, tmp_path / "lora.pt")
    net = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(dt.DeltatuneError, match=words):
        load_loralib(net, tmp_path / "lora.pt", alpha=7, **options)
    assert not dt.adapters(net) and type(net[0]) is nn.Linear


def test_a_missing_or_damaged_file_is_named(tmp_path):
    net = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(dt.DeltatuneError, match="nowhere.pt: there is no such file"):
        load_loralib(net, tmp_path / "nowhere.pt", alpha=7)
    for name in ("cut.pt", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02}q\x00")
        with pytest.raises(dt.DeltatuneError, match=f"{name}: not a file of tensors alone, or damaged"):
            load_loralib(net, tmp_path / name, alpha=7)
