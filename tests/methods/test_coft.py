"""COFT (arXiv:2306.07280): the ball, the projection in training and out of it, and PEFT's scaling of eps."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core import Run
from deltatune.methods.oft import skew


def one(eps, dtype=torch.double, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 5)).to(dtype)
    adapter = dt.attach(net, dt.COFT(block_size=4, eps=eps, targets="0", **options))
    ((_, unit),) = adapter.units()
    with torch.no_grad():
        unit.q.copy_((torch.tensor([[0.5], [0.02], [0.0]]) * torch.randn(3, 6))[: len(unit.q)])
    return net, adapter, unit


def norms(unit):
    return torch.linalg.matrix_norm(skew(unit.q.detach(), 4))


def test_a_block_outside_the_ball_is_scaled_onto_it_and_the_others_are_left():
    net, _, unit = one(0.1)
    before, w = unit.q.detach().clone(), net[0].weight
    outer = norms(unit) > 0.1
    assert outer.tolist() == [True, False, False] and norms(unit)[1] > 0
    scale = torch.where(outer, 0.1 / norms(unit), 1.0)[:, None]
    want = copy.deepcopy(unit)
    with torch.no_grad():
        want.q.copy_(scale * before)
    torch.testing.assert_close(unit.weight(w), want.weight(w), rtol=1e-12, atol=1e-12)
    assert torch.equal(unit.q, before)
    unit.project()
    torch.testing.assert_close(unit.q.detach(), scale * before, rtol=1e-12, atol=1e-12)
    assert torch.equal(unit.q[1:], before[1:]) and (norms(unit) <= 0.1 * (1 + 1e-12)).all()


@pytest.mark.parametrize("eps", [1e-3, 0.05, 3.0])
def test_how_far_the_rotations_are_from_the_identity(eps):
    _, _, unit = one(eps)
    r, eye = unit.rotations().detach(), torch.eye(4, dtype=torch.double)
    unit.project()
    q = skew(unit.q.detach(), 4)
    far = torch.linalg.matrix_norm(r - eye)
    torch.testing.assert_close(far, 2 * torch.linalg.matrix_norm(q @ torch.linalg.inv(eye - q)), rtol=1e-9, atol=1e-12)
    assert (far <= 2 * eps).all()
    if eps == 1e-3:
        assert far[0] == pytest.approx(2 * eps, rel=1e-5)


def test_an_infinite_ball_is_oft():
    net, _, unit = one(float("inf"))
    other = nn.Sequential(nn.Linear(12, 5)).double()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k})
    ((_, free),) = dt.attach(other, dt.OFT(block_size=4, targets="0")).units()
    free.load_state_dict(unit.state_dict())
    x = torch.randn(4, 12, dtype=torch.double)
    assert torch.equal(net(x), other(x))


def test_a_step_of_training_is_projected_gradient_descent():
    """Against SGD on Q of OFT, with the projection written here; the loop's optimizer keeps its momentum."""
    net, adapter, unit = one(0.3)
    unit.project()
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(12, 5)).double()
    ((_, free),) = dt.attach(other, dt.OFT(block_size=4, targets="0")).units()
    free.load_state_dict(unit.state_dict())
    run = Run(net, adapter, 5, optimizer=torch.optim.SGD(adapter.parameters(), lr=0.5, momentum=0.9))
    (events,) = (c.start(run) for c in adapter.callbacks())
    x, y = torch.randn(8, 12, dtype=torch.double), torch.randn(8, 5, dtype=torch.double)
    momentum, crossed = torch.zeros_like(free.q), 0
    for _ in range(5):
        run.optimizer.zero_grad()
        (net(x) - y).square().sum().backward()
        run.optimizer.step()
        events.on_step_end(run)
        (grad,) = torch.autograd.grad((other(x) - y).square().sum(), [free.q])
        momentum = 0.9 * momentum + grad
        with torch.no_grad():
            free.q.sub_(0.5 * momentum)
            for row in free.q:
                size = skew(row, 4).norm()
                crossed += int(size > 0.3)
                row.mul_(min(1.0, 0.3 / float(size)))
        torch.testing.assert_close(unit.q, free.q, rtol=1e-9, atol=1e-12)
        assert (norms(unit) <= 0.3 * (1 + 1e-12)).all()
    assert crossed > 3


def test_units_inside_others_are_projected_too():
    net = nn.Sequential(nn.Linear(12, 12)).double()
    expert = dt.COFT(block_size=4, eps=1e-3)
    adapter = dt.attach(net, dt.Mixture(expert=expert, n=2, top_k=2, balance=0.0, targets="0"))
    ((_, experts),) = adapter.units()
    with torch.no_grad():
        for unit in experts.experts:
            unit.q.fill_(1.0)
    run = Run(net, adapter, 1)
    for callback in adapter.callbacks():
        callback.start(run).on_step_end(run)
    assert all(torch.allclose(norms(u), torch.tensor(1e-3).double(), rtol=1e-6) for u in experts.experts)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_a_ball_must_have_a_size(eps):
    with pytest.raises(dt.DeltatuneError, match="eps must be positive"):
        dt.COFT(eps=eps)


@pytest.mark.parametrize("shared", [False, True])
def test_peft_divides_eps_by_the_root_of_the_number_of_blocks(shared):
    base = nn.Sequential(nn.Linear(12, 5))
    state = copy.deepcopy(base.state_dict())
    blocks = 1 if shared else 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.OFTConfig(oft_block_size=4, block_share=shared, use_cayley_neumann=False, target_modules=["0"],
                                coft=True, eps=0.2 * blocks**0.5)  # fmt: skip
        theirs = peft.get_peft_model(base, config).eval()
    net, _, unit = one(0.2, torch.float, blocks="shared" if shared else "own")
    net.load_state_dict(state, strict=False)
    (q,) = (p for p in theirs.parameters() if p.requires_grad)
    with torch.no_grad():
        q.copy_(-unit.q)
    x = torch.randn(3, 12)
    assert (norms(unit) > 0.2).any()
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-5, atol=1e-5)
    unit.project()
    torch.testing.assert_close(unit.q, -q, rtol=1e-5, atol=1e-7)  # PEFT writes the projection in its forward
