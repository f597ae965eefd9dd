"""Under autocast the nodes keep the weight that the model holds anyway, and no narrow copy of it."""

import pytest
import torch

from deltatune.kernels import lowrank, lowrank_rows

OUT, IN, R = 6, 5, 2


def made():
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 4, IN), torch.randn(OUT, IN), torch.randn(OUT)
    return x.requires_grad_(), w, b, torch.randn(R, IN, requires_grad=True), torch.randn(OUT, R, requires_grad=True)


def one(x, w, b, down, up):
    return lowrank.linear(x, w, b, down, up, 2.0)


def of_each_row(x, w, b, down, up):
    return lowrank_rows.linear(x, w, b, torch.tensor([0, -1, 0]), [lowrank_rows.Part(up, down, 2.0, 0.0, None)])


@pytest.mark.parametrize("linear", [one, of_each_row])
def test_no_copy_of_the_weight_is_kept(linear):
    x, w, b, down, up = made()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w, b, down, up)
    (weight,) = [t for t in kept if t.shape == w.shape]
    assert weight.data_ptr() == w.data_ptr() and y.dtype is torch.bfloat16


@pytest.mark.parametrize("linear", [one, of_each_row])
@pytest.mark.parametrize("trains", [False, True])
def test_gradients_are_those_of_plain_layers_under_autocast(linear, trains):
    given = made()
    given[1].requires_grad_(trains)
    with torch.autocast("cpu", torch.bfloat16):
        x, w, b, down, up = given
        change = 2.0 * torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
        if linear is of_each_row:
            change = change * torch.tensor([1, 0, 1])[:, None, None]
        want = torch.nn.functional.linear(x, w, b) + change
        got = linear(*given)
    wanted = [t for t in given if t.requires_grad]
    weigh = torch.randn(3, 4, OUT)
    for a, e in zip(torch.autograd.grad((got * weigh).sum(), wanted), torch.autograd.grad((want * weigh).sum(), wanted),
                    strict=True):  # fmt: skip
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, e, rtol=0.05, atol=0.1)
