"""(IA)^3 (arXiv:2205.05638): three vectors a block, exact merging with biases, and where scaling commutes."""

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.models.tiny import inputs, tiny


def test_a_block_trains_keys_values_and_the_feed_forwards_inner_size():
    net = tiny("t5")
    d_kv, d_ff = net.config.num_heads * net.config.d_kv, net.config.d_ff
    encoder, decoder = 2 * d_kv + d_ff, 4 * d_kv + d_ff  # a decoder block has cross-attention as well
    plan = dt.plan(net, dt.IA3())
    assert plan.trained == net.config.num_layers * encoder + net.config.num_decoder_layers * decoder


@pytest.mark.parametrize("on_input", [None, "0"])
def test_an_output_is_scaled_with_its_bias_and_an_input_without(on_input):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5)).double()
    w, b = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    adapter = dt.attach(net, dt.IA3(targets="0", on_input=on_input))
    ((_, unit),) = adapter.units()
    with torch.no_grad():
        unit.l.copy_(torch.randn(unit.l.shape, dtype=torch.double))
    x = torch.randn(3, 6, dtype=torch.double)
    want = unit.l * (x @ w.T + b) if on_input is None else (x * unit.l) @ w.T + b
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    dt.merge(net)
    torch.testing.assert_close(net(x), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(net[0].bias, b) == (on_input is not None)


def test_scaling_the_keys_is_scaling_the_queries():
    """Attention's scores are products of the two, where no rotation lies between: GPT-2."""
    outs = []
    for part in ("q", "k"):
        torch.manual_seed(0)
        net = tiny("gpt2").double()
        adapter = dt.attach(net, dt.IA3(targets=dt.Part(part)))
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.linspace(0.2, 3, len(p)))
        outs.append(net(**inputs(net)).logits)
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-10)
