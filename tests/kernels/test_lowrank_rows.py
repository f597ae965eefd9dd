"""Rows of a batch under low-rank changes of their own: what separate runs give, in one node that keeps X once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.kernels import lowrank
from deltatune.kernels.lowrank_rows import Part, linear, reference, segments_of

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
IN, OUT = 6, 7
RANKS, SCALES = (3, 1, 4), (0.7, 2.0, -0.5)

on_each = pytest.mark.parametrize("device", DEVICES)


def tensors(device, batch, t=2, dtype=torch.float64, trained="x w bias up down", transposed=False):
    g = torch.Generator().manual_seed(0)

    def made(name, *shape):
        return torch.randn(shape, generator=g, dtype=dtype).to(device).requires_grad_(name in trained.split())

    x, w, bias = made("x", batch, t, IN), made("w", *((IN, OUT) if transposed else (OUT, IN))), made("bias", OUT)
    return x, w, bias, [(made("up", OUT, r), made("down", r, IN)) for r in RANKS]


def parts_of(factors, dropout=0.0):
    given = enumerate(zip(factors, SCALES, strict=False))
    return [Part(up, down, s, dropout, seed=10 + i) for i, ((up, down), s) in given]


def apart(x, w, bias, rows, parts):
    """Each adapter in a run of its own, over its own rows."""
    y = x.new_zeros(*x.shape[:-1], len(w))
    for i in sorted(set(rows.tolist())):
        mine = (rows == i).nonzero().flatten()
        if i < 0:
            own = F.linear(x[mine], w, bias)
        else:
            up, down, scale, dropout, seed = parts[i]
            own = lowrank.linear(x[mine], w, bias, down, up, scale, dropout, seed)
        y = y.index_copy(0, mine, own)
    return y


@on_each
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [[0, 0, 1, 2], [1, -1, 0, 1], [2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_in_double_precision(dropout, rows, transposed, device):
    x, w, bias, factors = tensors(device, len(rows), transposed=transposed)
    rows = torch.tensor(rows, device=device)
    leaves = [f for i, pair in enumerate(factors) if i in rows for f in pair]

    def run(x, w, bias, *_):
        return linear(x, w.T if transposed else w, bias, rows, parts_of(factors, dropout))

    assert torch.autograd.gradcheck(run, (x, w, bias, *leaves))


@on_each
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(-1, 2), min_size=1, max_size=7),
    trained=st.sets(st.sampled_from(["x", "w", "bias", "up", "down"]), min_size=1),
    dropout=st.sampled_from([0.0, 0.4]),
    t=st.integers(1, 3),
)
def test_rows_are_those_of_separate_runs_and_so_are_gradients(rows, trained, dropout, t, device):
    rows, trained = torch.tensor(rows, device=device), " ".join(trained)
    got, want = (tensors(device, len(rows), t, trained=trained) for _ in range(2))
    x, w, bias, factors = got
    y = linear(x, w, bias, rows, parts_of(factors, dropout))
    separate = apart(*want[:3], rows, parts_of(want[3], dropout))
    torch.testing.assert_close(y, separate)
    if not separate.requires_grad:  # what trains has no rows
        assert not y.requires_grad
        return
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)).to(device)
    for out in (y, separate):
        out.backward(g)
    pairs = [*zip(got[:3], want[:3], strict=True)]
    pairs += [(a, b) for p, q in zip(got[3], want[3], strict=True) for a, b in zip(p, q, strict=True)]
    for a, b in pairs:
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@on_each
def test_without_gradients_and_for_flattened_tokens_it_is_the_same(device):
    x, w, bias, factors = tensors(device, 8, 1)
    rows = torch.tensor([0, 1, -1, 1, 2, 2, 0, 0], device=device)
    want = apart(x, w, bias, rows, parts_of(factors))
    with torch.no_grad():
        y = linear(x.flatten(0, 1), w, bias, rows, parts_of(factors))
    assert y.grad_fn is None and y.shape == (8, OUT)
    torch.testing.assert_close(y, want.flatten(0, 1).detach())


@on_each
@given(rows=st.lists(st.integers(-1, 3), min_size=1, max_size=9))
def test_every_row_is_in_the_segment_of_its_adapter(rows, device):
    found = segments_of(torch.tensor(rows, device=device))
    assert [i for i, _ in found] == sorted({i for i in rows if i >= 0})
    for i, where in found:
        mine = torch.arange(len(rows), device=device)[where].tolist()
        assert mine == [at for at, j in enumerate(rows) if j == i]
        assert isinstance(where, slice) == (mine[-1] - mine[0] + 1 == len(mine))


def saved(rows, trained, device):
    x, w, bias, factors = tensors(device, len(rows), 16, torch.float32, trained)
    factors = [(up[:, :1], down[:1]) for up, down in factors]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        linear(x, w, bias, torch.tensor(rows, device=device), parts_of(factors, 0.5))
    parameters = {t.data_ptr() for t in (w, *(f for pair in factors for f in pair))}
    return sum(t.nbytes for t in sizes if t.data_ptr() not in parameters)


@on_each
@pytest.mark.parametrize("rows", [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]], ids=str)
def test_the_input_is_kept_once_whatever_the_number_of_adapters(rows, device):
    tokens = len(rows) * 16
    assert saved(rows, "x up down", device) == tokens * (IN + 1) * 4
    assert saved(rows, "x down", device) == tokens * IN * 4
    assert saved(rows, "x up", device) == tokens * 4
    assert saved(rows, "x", device) == 0


@on_each
def test_there_is_one_node_and_the_frozen_products_are_made_once(device):
    class Products(TorchDispatchMode):
        sizes: list[int]

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                a, b = [t for t in args if isinstance(t, torch.Tensor) and t.ndim == 2][-2:]
                self.sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
            return op(*args, **(kwargs or {}))

    rows = torch.tensor([0, 1, 2, -1, 0, 1], device=device)
    x, w, bias, factors = tensors(device, len(rows), trained="x up down")
    with Products() as counter:
        counter.sizes = []
        y = linear(x, w, bias, rows, parts_of(factors))
        given = {fn for fn, _ in y.grad_fn.next_functions if fn is not None}
        assert {fn.name() for fn in given} == {"torch::autograd::AccumulateGrad"} and len(given) == 7
        y.sum().backward()
    largest = len(rows) * 2 * IN * OUT
    assert counter.sizes.count(largest) == 2 and max(s for s in counter.sizes if s != largest) < largest / 2


@on_each
@pytest.mark.parametrize("rows", [[0, 0, 1, -1], [1, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_factors_of_other_precisions_than_the_base_and_than_each_other(rows, dropout, device):
    rows = torch.tensor(rows, device=device)
    x, w, bias, factors = tensors(device, len(rows), dtype=torch.float32, trained="x up down")
    kinds = (torch.float32, torch.bfloat16)
    own = [[f.detach().to(k).requires_grad_() for f in pair] for pair, k in zip(factors, kinds, strict=False)]
    half = x.detach().bfloat16().requires_grad_()
    y = linear(half, w.bfloat16(), bias.bfloat16(), rows, parts_of(own, dropout))
    y.float().square().sum().backward()
    assert y.dtype == half.grad.dtype == torch.bfloat16
    wide = x.detach().bfloat16().float().requires_grad_()
    same = [[f.detach().float().requires_grad_() for f in pair] for pair in own]
    want = apart(wide, w.bfloat16().float(), bias.bfloat16().float(), rows, parts_of(same, dropout))
    want.square().sum().backward()
    torch.testing.assert_close(y.float(), want.detach(), atol=0.1, rtol=2e-2)
    torch.testing.assert_close(half.grad.float(), wide.grad, atol=1.0, rtol=5e-2)
    for pair, (a, b) in zip(own, same, strict=True):
        for f, true in zip(pair, (a, b), strict=True):
            assert f.grad.dtype == f.dtype
            torch.testing.assert_close(f.grad.float(), true.grad, atol=2.0, rtol=5e-2)


@on_each
def test_autocast_runs_the_products_in_its_precision(device):
    x, w, bias, factors = tensors(device, 3, dtype=torch.float32, trained="x up down")
    rows = torch.tensor([1, -1, 0], device=device)
    with torch.autocast(device, torch.bfloat16):
        y = linear(x, w, bias, rows, parts_of(factors))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), apart(x, w, bias, rows, parts_of(factors)), atol=0.2, rtol=5e-2)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *factors[0], *factors[1]))


@on_each
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_quantised_weight_is_made_once_in_the_backward_pass(dropout, device):
    rows = torch.tensor([0, 1, -1, 0], device=device)
    got, want = (tensors(device, len(rows), trained="x up down") for _ in range(2))
    x, w, bias, factors = got
    made = []
    frozen = lowrank.Quantised(lambda t: F.linear(t, w, bias), lambda: made.append(1) or w.clone())
    y = linear(x, frozen, bias, rows, parts_of(factors, dropout))
    assert not made
    y.square().sum().backward()
    assert len(made) == 1
    apart(*want[:3], rows, parts_of(want[3], dropout)).square().sum().backward()
    for a, b in zip((x, *factors[0], *factors[1]), (want[0], *want[3][0], *want[3][1]), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@on_each
def test_compiled_it_is_the_reference(device):
    torch._dynamo.reset()
    rows = torch.tensor([0, 1, -1, 0], device=device)
    x, w, bias, factors = tensors(device, len(rows))
    compiled = torch.compile(
        lambda x, rows: linear(x, w, bias, rows, parts_of(factors)), fullgraph=True, backend="eager"
    )
    want = linear(x, w, bias, rows, parts_of(factors))
    torch.testing.assert_close(compiled(x, rows), want)
    torch.testing.assert_close(reference(x, w, bias, rows, parts_of(factors)), want)
