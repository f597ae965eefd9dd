"""P-tuning as PEFT has it: its encoder's outputs, its files in both directions, and the drop-in."""

import warnings

import peft
import pytest
import torch
from peft_pairs import base, close, config_of, from_peft, outputs, perturb, saved, tensors_of

from deltatune.core import DeltatuneError, attach, load
from deltatune.interop import peft as dropin
from deltatune.methods.p_tuning import PTuning
from deltatune.models.prompting import Prompt
from deltatune.models.tiny import inputs

TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bloom": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
P = 3
ENCODERS = {"mlp": {"encoder_hidden_size": 16}, "lstm": {"encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 12, "encoder_num_layers": 3}}  # fmt: skip
# PEFT's encoder makes as many vectors again for a decoder and drops them; its LSTM reads them, which no MLP can
CASES = [(f, e) for f in TASK for e in ENCODERS if (f, e) != ("t5", "lstm")]
encoders = pytest.mark.parametrize("encoder", ENCODERS)


def _theirs(family, encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptEncoderConfig(task_type=TASK[family], num_virtual_tokens=P, **ENCODERS[encoder])
        model = peft.get_peft_model(base(family), config).eval()
    perturb((p for p in model.parameters() if p.requires_grad), 0.1)
    return model


def _ours(family, encoder):
    config = dropin.PromptEncoderConfig(task_type=TASK[family], num_virtual_tokens=P, **ENCODERS[encoder])
    return dropin.get_peft_model(base(family), config).eval()


def _source(model):
    return next(m for m in model.modules() if isinstance(m, Prompt)).source


@pytest.mark.parametrize(("family", "encoder"), CASES)
def test_the_drop_ins_encoder_is_pefts(family, encoder, tmp_path):
    """Weight for weight, in the model's outputs, and in what PEFT reads from the file."""
    theirs, ours = _theirs(family, encoder), _ours(family, encoder)
    given = inputs(base(family))
    own = {n: p for n, p in theirs.prompt_encoder["default"].named_parameters()}
    renamed = {"e": own.pop("embedding.weight")[:P]} | {n.replace("_head.", "."): p for n, p in own.items()}
    _source(ours).load_state_dict(renamed)
    dropped = P * 32 if family == "t5" else 0
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) + dropped == sum(
        p.numel() for p in theirs.prompt_encoder.parameters()
    )
    got = outputs(ours, given)
    close(got, outputs(theirs, given)[:, -got.shape[1] :])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    close(outputs(from_peft(base(family), tmp_path / "ours"), given)[:, -got.shape[1] :], got)
    a, b = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert a.keys() - {"deltatune"} == b.keys() and a["peft_type"] == "P_TUNING"
    assert {k: v for k, v in a.items() if k.startswith("encoder_")} == {
        k: v for k, v in b.items() if k.startswith("encoder_")
    }
    both = (tensors_of(tmp_path / who)["prompt_embeddings"][:P] for who in ("ours", "theirs"))
    close(*both)


@encoders
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_peft_trained_is_read_as_vectors(family, encoder, tmp_path):
    theirs = _theirs(family, encoder)
    given = inputs(base(family))
    theirs.save_pretrained(tmp_path)
    net = base(family)
    adapter = load(net, tmp_path)
    assert adapter.method == PTuning(length=P, encoder=None)
    assert [tuple(p.shape) for p in adapter.parameters()] == [(P, 32)]
    got = outputs(net, given)
    close(got, outputs(theirs, given)[:, -got.shape[1] :])
    again = dropin.PeftModel.from_pretrained(base(family), tmp_path)
    close(outputs(again, given), got)


@pytest.mark.parametrize("encoder", ["lstm", "mlp", None])
def test_what_we_wrote(encoder, tmp_path):
    net = base("llama")
    given = inputs(net)
    want, _ = saved(net, PTuning(length=P, encoder=encoder), tmp_path)
    close(outputs(from_peft(base("llama"), tmp_path), given)[:, P:], want)
    again = base("llama")
    load(again, tmp_path)
    close(outputs(again, given), want)


def test_placed_tokens_have_no_place_in_pefts_layout(tmp_path):
    net = base("llama")
    attach(net, PTuning(length=P, token=98)).save(tmp_path)
    assert "peft_type" not in config_of(tmp_path)
    again = base("llama")
    assert load(again, tmp_path).method == PTuning(length=P, token=98)
    given = inputs(net)
    given["input_ids"][:, 1 : 1 + P] = 98
    assert torch.equal(outputs(again, given), outputs(net, given))


def test_what_the_drop_in_refuses():
    config = dropin.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_dropout=0.1
    )
    with pytest.raises(DeltatuneError, match=r"encoder_dropout=0\.1 is not offered"):
        dropin.get_peft_model(base("llama"), config)
    with pytest.raises(DeltatuneError, match="'GRU' is none of MLP, LSTM"):
        dropin.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="GRU")
