"""The layer under a sparse difference against the dense weight written out, and its gradients against differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.kernels.sparse_linear import added, sparse_linear

PLACES = torch.tensor([0, 7, 3, 19])


def made(bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    made = torch.Generator().manual_seed(0)
    x, w, b, v = (torch.randn(*s, generator=made, dtype=torch.float64) for s in ((2, 3, 5), (4, 5), (4,), (4,)))
    return x, w, b if bias else None, v


@pytest.mark.parametrize("bias", [True, False])
def test_its_gradients_are_those_of_differences(bias: bool) -> None:
    x, w, b, v = made(bias)
    given = [t.requires_grad_() for t in (x, w, b, v) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, w, *rest: sparse_linear(x, w, rest[0] if bias else None, rest[-1], PLACES), given
    )


def test_the_weight_has_each_value_at_its_row_and_column() -> None:
    x, w, b, v = made()
    dense = w.clone()
    for value, place in zip(v.tolist(), PLACES.tolist(), strict=True):
        dense[place // 5, place % 5] += value
    assert torch.equal(added(w, v, PLACES), dense)
    torch.testing.assert_close(sparse_linear(x, w, b, v, PLACES), F.linear(x, dense, b), rtol=1e-12, atol=1e-12)


def test_a_sum_is_made_in_the_wider_precision_and_rounded_once() -> None:
    w, v = torch.full((1, 1), 1.0, dtype=torch.bfloat16), torch.tensor([2.0**-8 + 2.0**-16])
    assert added(w, v, torch.tensor([0])).item() == 1 + 2**-7  # v rounded first would be a tie, and go down to 1


@pytest.mark.parametrize("trains", [(), (0,), (1,), (3,)])
def test_what_does_not_train_gets_no_gradient(trains: tuple[int, ...]) -> None:
    given = [t for t in made() if t is not None]
    for k in trains:
        given[k].requires_grad_()
    y = sparse_linear(*given, PLACES)
    assert y.requires_grad == bool(trains)
    if trains:
        y.sum().backward()
        assert [t.grad is not None for t in given] == [k in trains for k in range(4)]
