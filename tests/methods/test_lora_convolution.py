"""LoRA (arXiv:2106.09685) on convolutions, with B A read as a kernel: (out, in / groups, *size)."""

import pytest
import torch
import torch.nn.functional as F
from tensors_made import Made
from torch import nn

import deltatune as dt

CASES = {
    "conv1d": (nn.Conv1d(6, 8, 5, stride=2, padding=2, dilation=2), (2, 6, 17)),
    "conv1d, circular": (nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 17)),
    "conv2d": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 6, 9, 7)),
    "conv2d, groups": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 7)),
    "conv2d, depthwise": (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 7)),
    "conv3d": (nn.Conv3d(6, 8, (3, 2, 1)), (2, 6, 5, 4, 3)),
}


@pytest.mark.parametrize("kind", CASES)
def test_it_is_the_convolution_with_the_updated_kernel_active_and_merged(kind):
    module, shape = CASES[kind]
    torch.manual_seed(0)
    net = nn.Sequential(type(module)(module.in_channels, module.out_channels, module.kernel_size, module.stride,
                                     module.padding, module.dilation, module.groups, module.bias is not None,
                                     module.padding_mode)).double()  # fmt: skip
    conv, x = net[0], torch.randn(shape, dtype=torch.double, requires_grad=True)
    ((_, unit),) = dt.attach(net, dt.LoRA(r=3, alpha=7, targets="0")).units()
    assert sum(p.numel() for p in unit.parameters()) == 3 * (len(conv.weight) + conv.weight[0].numel())
    assert torch.equal(net(x), type(module).forward(conv, x))
    with torch.no_grad():
        unit.b.normal_()
    kernel = conv.weight + 7 / 3 * torch.einsum("or,rf->of", unit.b, unit.a).reshape(conv.weight.shape)
    function = getattr(F, f"conv{x.ndim - 2}d")
    before, padding = x, conv.padding
    if conv.padding_mode == "circular":
        before, padding = F.pad(x, (1, 1), mode="circular"), 0
    want = function(before, kernel, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
    torch.testing.assert_close(net(x), want, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(net(x).square().sum(), (x, unit.a, unit.b))
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), (x, unit.a, unit.b)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)
    dt.merge(net)
    torch.testing.assert_close(net(x), want, rtol=1e-11, atol=1e-11)


def test_the_kernel_is_never_formed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 48, 3))
    dt.attach(net, dt.LoRA(r=2, targets="0"))
    with Made() as made:
        net(torch.randn(1, 32, 4, 4)).sum().backward()
    assert made.largest < 32 * 48 * 9 / 4
