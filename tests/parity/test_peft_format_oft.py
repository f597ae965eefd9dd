"""OFT, COFT, OFTv2 and BOFT in PEFT's layout, both ways: outputs against PEFT 0.21.2 itself."""

import warnings

import peft
import pytest
import torch
from peft import BOFTConfig, OFTConfig
from peft_pairs import base, close, config_of, edit, from_peft, outputs, perturb, save_peft, saved, tensors_of
from torch import nn

import deltatune as dt
from deltatune.models.tiny import inputs

METHODS = {
    "oft": dt.OFT(block_size=8),
    "oft shared": dt.OFT(block_size=16, blocks="shared", targets="all-linear"),
    "coft": dt.COFT(block_size=8, eps=0.1, targets=dt.Part("q", "v")),
    "coft shared": dt.COFT(block_size=8, blocks="shared", eps=0.1),
    "oft_v2": dt.OFTv2(block_size=8),
    "oft_v2 odd": dt.OFTv2(k=3, blocks="shared", block_size=4),
    "boft": dt.BOFT(block_size=4, m=1),
    "boft learned": dt.BOFT(block_size=8, m=1, magnitude="learned", targets="all-linear"),
    "equal numbers of blocks": dt.Union(
        methods=(dt.OFT(block_size=8, targets=dt.Part("q")), dt.OFT(block_size=16, targets=dt.Part("down")))
    ),
    "boft, equal numbers of blocks": dt.Union(
        methods=(dt.BOFT(block_size=8, m=1, targets=dt.Part("q")), dt.BOFT(block_size=16, m=1, targets=dt.Part("down")))
    ),
    "head": dt.Union(methods=(dt.OFTv2(block_size=8), dt.Tune())),
}
CASES = [(f, m) for f in ("llama", "bert", "opt") for m in METHODS] + [("t5", "oft"), ("bloom", "boft")]


@pytest.mark.parametrize("family,name", CASES)
def test_peft_computes_what_we_wrote(family, name, tmp_path):
    net = base(family)
    given = inputs(net)
    want, plain = saved(net, METHODS[name], tmp_path / "a")
    theirs = from_peft(base(family), tmp_path / "a")
    close(outputs(theirs, given), want, atol=2e-5)
    ours = base(family)
    adapter = dt.load(ours, tmp_path / "a")
    close(outputs(ours, given), want)
    kinds = {type(p) for p in METHODS[name].parts()}
    assert {type(p) for p in adapter.method.parts()} == kinds
    dt.detach(ours)
    close(outputs(ours, given), plain, atol=0)
    theirs.save_pretrained(tmp_path / "b")
    dt.load(ours, tmp_path / "b")
    close(outputs(ours, given), want)


@pytest.mark.parametrize("family", ["bert", "opt"])
@pytest.mark.parametrize("method", [dt.OFT(block_size=8), dt.BOFT(block_size=4, m=1)], ids=["oft", "boft"])
def test_trained_biases_are_saved_too(family, method, tmp_path):
    net = base(family)
    given = inputs(net)
    want, _ = saved(net, dt.Union(methods=(method, dt.BitFit())), tmp_path)
    assert config_of(tmp_path)["bias"] == "all"
    close(outputs(from_peft(base(family), tmp_path), given), want)
    again = base(family)
    dt.load(again, tmp_path)
    close(outputs(again, given), want)


CONFIGS = {
    "defaults": OFTConfig(target_modules=["q_proj", "down_proj"]),
    "blocks by number": OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"]),
    "three terms": OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3, target_modules=["v_proj"]),
    "exact": OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["o_proj"]),
    "exact by number": OFTConfig(r=8, oft_block_size=0, use_cayley_neumann=False, target_modules="all-linear"),
    "a ball": OFTConfig(oft_block_size=8, coft=True, eps=0.2, use_cayley_neumann=False, target_modules="all-linear"),
    "a small ball": OFTConfig(oft_block_size=8, coft=True, eps=5e-3, target_modules=["q_proj"], block_share=True),
    "butterflies": BOFTConfig(boft_block_size=8, target_modules=["q_proj", "up_proj"]),
    "butterflies by number": BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=["q_proj", "down_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_we_compute_what_peft_wrote(name, tmp_path):
    net = base("llama")
    given = inputs(net)
    _, want = save_peft(net, CONFIGS[name], tmp_path)
    again = base("llama")
    assert (outputs(again, given) - want).abs().max() > 1e-3
    adapter = dt.load(again, tmp_path)
    close(outputs(again, given), want, atol=2e-5)
    adapter.save(tmp_path / "back")
    close(outputs(from_peft(base("llama"), tmp_path / "back"), given), want, atol=2e-5)
    for key, t in tensors_of(tmp_path).items():
        if "boft_R" not in key and name != "a small ball":  # PEFT uses what is skew of a block; the ball is now exact
            torch.testing.assert_close(tensors_of(tmp_path / "back")[key], t)


class Blocks:
    """What PEFT's CUDA extension computes: (n, blocks, b, b) -> n block-diagonal matrices."""

    @staticmethod
    def apply(c):
        return torch.stack([torch.block_diag(*one) for one in c])


def test_several_butterfly_factors(tmp_path, monkeypatch):
    net = base("llama")
    given = inputs(net)
    want, _ = saved(net, dt.BOFT(block_size=4, m=3, p1=0.5, p2=0.2, magnitude="learned"), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):  # no extension here, which PEFT does not do without
        from_peft(base("llama"), tmp_path)
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Blocks)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", Blocks)
    close(outputs(from_peft(base("llama"), tmp_path), given), want, atol=2e-5)
    again = base("llama")
    method = dt.load(again, tmp_path).method
    close(outputs(again, given), want)
    assert (method.block_size, method.m, method.p1 * method.p2) == (4, 3, pytest.approx(0.1))


OURS = {
    "a learned magnitude": ("llama", dt.OFT(block_size=8, magnitude="learned")),
    "rows of a fused projection": ("bloom", dt.OFT(block_size=8, targets=dt.Part("q"))),
    "a layer that stores (in, out)": ("gpt2", dt.OFTv2(block_size=8)),
    "an embedding": ("llama", dt.OFT(block_size=8, targets=dt.Part("embedding"))),
    "one power": ("llama", dt.OFTv2(block_size=8, k=1)),
    "eps that PEFT would scale apart": ("llama", dt.COFT(block_size=8, eps=0.1, targets=dt.Part("q", "down"))),
    "no size nor number in common": ("llama", dt.Union(
        methods=(dt.OFT(block_size=8, targets=dt.Part("q")), dt.OFT(block_size=4, targets=dt.Part("v"))))),
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


@pytest.mark.parametrize("fields,words", [
    ({"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms = 2 is not supported"),
    ({"coft": True, "eps": 0.5}, "coft with eps = 0.5"),
])  # fmt: skip
def test_fields_that_change_the_maths_are_refused_by_name(fields, words, tmp_path):
    save_peft(base("llama"), OFTConfig(target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, **fields)
    net = base("llama")
    with pytest.raises(dt.DeltatuneError, match=words):
        dt.load(net, tmp_path)
    assert not dt.adapters(net)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 2)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("config", [OFTConfig(oft_block_size=4, target_modules=["conv"]),
                                    BOFTConfig(boft_block_size=4, target_modules=["conv"])])  # fmt: skip
def test_convolutions_are_refused(config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    with pytest.raises(dt.DeltatuneError, match="of a Conv2d is not supported"):
        dt.load(Net(), tmp_path)


def test_a_dropout_that_is_not_kept_is_told(tmp_path):
    save_peft(base("llama"), OFTConfig(target_modules=["q_proj"], module_dropout=0.1), tmp_path)
    with pytest.warns(UserWarning, match="module_dropout = 0.1"):
        dt.load(base("llama"), tmp_path)
