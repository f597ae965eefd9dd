"""BitFit (arXiv:2106.10199): the count of BERT-base, and the bias that cannot matter."""

import torch
from transformers import BertConfig, BertModel

import deltatune as dt
from deltatune.models.tiny import inputs, tiny


def test_bert_base_has_102_912_biases():
    """11 d a block, the embedding norm's d and the pooler's d, with d = 768 and 12 blocks: 0.09 % of the model."""
    with torch.device("meta"):
        net = BertModel(BertConfig())
    plan = dt.plan(net, dt.BitFit())
    assert plan.trained == 12 * 11 * 768 + 768 + 768 == 102_912
    assert round(100 * plan.trained / plan.total, 2) == 0.09


def test_the_key_bias_adds_the_same_to_every_score_so_it_has_no_gradient():
    net = tiny("bert").double()
    adapter = dt.attach(net, dt.BitFit())
    net(**inputs(net)).logits.square().sum().backward()
    largest = {n: p.grad.abs().max().item() for n, p in adapter.named_parameters()}
    keys = [g for n, g in largest.items() if ".key." in n]
    assert keys and max(keys) < 1e-12 < 1e-3 < min(g for n, g in largest.items() if ".key." not in n)


def test_the_table_of_relative_positions_is_no_bias():
    """T5 calls an embedding `relative_attention_bias`; BitFit finds nothing there to train, and says so."""
    net = tiny("t5")
    try:
        dt.attach(net, dt.BitFit())
    except dt.DeltatuneError as error:
        assert "has a bias; this model has none to train: IA3" in str(error)
    else:
        raise AssertionError("T5 has no bias vectors")
