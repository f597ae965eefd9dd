"""The fused low-rank linear: exact in double precision, saves what it must and nothing else, computes what is asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.kernels import lowrank

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
N, IN, OUT, R = 5, 6, 7, 3

on_each = pytest.mark.parametrize("device", DEVICES)


def tensors(device, dtype=torch.float64, trained="x down up bias w", transposed=False, batch=(N,)):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (*batch, IN),
        "w": (IN, OUT) if transposed else (OUT, IN),
        "bias": (OUT,),
        "down": (R, IN),
        "up": (OUT, R),
    }
    made = {k: torch.randn(s, generator=g, dtype=dtype).to(device) for k, s in shapes.items()}
    for k, t in made.items():
        t.requires_grad_(k in trained.split())
    return made, made["w"].T if transposed else made["w"]


def mask_of(seed, p, x):
    """What the kernel hides of x (n, in): drawn on its device, from the seed."""
    return torch.empty_like(x).bernoulli_(1 - p, generator=torch.Generator(x.device).manual_seed(seed))


def explicit(x, w, bias, down, up, scale, mask, keep):
    """sum_i x_i W_oi + b_o + s sum_r B_or sum_i A_ri m_i x_i / keep, by einsum."""
    h = torch.einsum("...i,ri->...r", x * mask / keep, down)
    y = torch.einsum("...i,oi->...o", x, w) + scale * torch.einsum("...r,or->...o", h, up)
    return y if bias is None else y + bias


@on_each
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_in_double_precision(dropout, biased, transposed, device):
    made, w = tensors(device, transposed=transposed, batch=(2, N))
    bias = made["bias"] if biased else None
    leaves = [made["x"], made["w"], made["down"], made["up"], *([bias] if biased else [])]

    def run(x, w, down, up, bias=None):
        return lowrank.linear(x, w.T if transposed else w, bias, down, up, 0.7, dropout, seed=11)

    assert torch.autograd.gradcheck(run, leaves)
    mask = mask_of(11, dropout, made["x"].detach().flatten(0, 1)).view(2, N, IN) if dropout else 1.0
    want = explicit(made["x"], w, bias, made["down"], made["up"], 0.7, mask, 1 - dropout)
    torch.testing.assert_close(run(*leaves), want)


@on_each
@settings(max_examples=40, deadline=None)
@given(trained=st.sets(st.sampled_from(["x", "down", "up", "bias", "w"]), min_size=1),
       dropout=st.sampled_from([0.0, 0.3]))  # fmt: skip
def test_whatever_trains_gets_its_gradient_and_nothing_else(trained, dropout, device):
    made, w = tensors(device, trained=" ".join(trained))
    y = lowrank.linear(made["x"], w, made["bias"], made["down"], made["up"], 2.0, dropout, seed=5)
    g = torch.randn(N, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    y.backward(g)
    mask = mask_of(5, dropout, made["x"].detach()) if dropout else 1.0
    copies = {k: t.detach().clone().requires_grad_(k in trained) for k, t in made.items()}
    explicit(copies["x"], copies["w"], copies["bias"], copies["down"], copies["up"], 2.0, mask, 1 - dropout).backward(g)
    for name, t in made.items():
        assert (t.grad is None) == (name not in trained), name
        if name in trained:
            torch.testing.assert_close(t.grad, copies[name].grad)


def saved(trained, device):
    made, w = tensors(device, torch.float32, trained, batch=(64,))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t) or t, lambda t: t):
        lowrank.linear(made["x"], w, None, made["down"], made["up"], dropout=0.5)
    parameters = {t.data_ptr() for t in made.values()} - {made["x"].data_ptr()}
    return sum(t.nbytes for t in sizes if t.data_ptr() not in parameters)


@on_each
def test_the_input_is_kept_only_if_down_trains(device):
    assert saved("x up", device) == 64 * R * 4  # LoRA-FA: X A^T alone, r numbers a token
    assert saved("x down", device) == 64 * IN * 4
    assert saved("x down up", device) == 64 * (IN + R) * 4
    assert saved("x", device) == 0


@on_each
def test_the_mask_is_drawn_anew_each_time_and_has_the_right_mean(device):
    made, w = tensors(device, torch.float32, "", batch=(4,))
    torch.manual_seed(3)
    ys = torch.stack([lowrank.linear(made["x"], w, None, made["down"], made["up"], 1.0, 0.5) for _ in range(4000)])
    assert not torch.equal(ys[0], ys[1])
    want = lowrank.linear(made["x"], w, None, made["down"], made["up"])
    torch.testing.assert_close(ys.mean(0), want, atol=0.25, rtol=0)


@on_each
def test_the_work_is_two_small_products_forward_and_at_most_four_backward(device):
    class Products(TorchDispatchMode):
        seen: list[int]

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            y = op(*args, **(kwargs or {}))
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                a, b = [t for t in args if isinstance(t, torch.Tensor) and t.ndim == 2][-2:]
                self.seen.append(a.shape[0] * a.shape[1] * b.shape[1])
            return y

    counter = Products()
    for trained, extra in (("x down up", 4), ("x up", 3), ("down up", 3), ("up", 1), ("x", 2)):
        made, w = tensors(device, torch.float32, trained)
        counter.seen = []
        with counter:
            lowrank.linear(made["x"], w, None, made["down"], made["up"]).sum().backward()
        large = 1 + ("x" in trained.split())
        assert counter.seen.count(N * IN * OUT) == large, trained
        assert len(counter.seen) == large + 2 + extra, trained


@on_each
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_factors_in_full_precision_on_a_half_precision_base(base, device):
    made, _ = tensors(device, torch.float32, "x down up")
    x, w = made["x"].detach().to(base).requires_grad_(), made["w"].detach().to(base)
    y = lowrank.linear(x, w, None, made["down"], made["up"], 0.5)
    assert y.dtype == base
    y.float().square().sum().backward()
    assert x.grad.dtype == base and made["down"].grad.dtype == torch.float32
    copies = [
        t.detach().clone().requires_grad_()
        for t in (x.double(), w.double(), made["down"].double(), made["up"].double())
    ]
    want = explicit(copies[0], copies[1], None, copies[2], copies[3], 0.5, 1.0, 1.0)
    want.square().sum().backward()
    torch.testing.assert_close(y.double(), want.detach(), atol=0.1, rtol=2e-2)
    torch.testing.assert_close(made["up"].grad.double(), copies[3].grad, atol=0.5, rtol=3e-2)


@on_each
def test_autocast_runs_the_products_in_its_precision(device):
    made, w = tensors(device, torch.float32, "x down up")
    with torch.autocast(device, torch.bfloat16):
        y = lowrank.linear(made["x"], w, None, made["down"], made["up"])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(made[k].grad.dtype == torch.float32 for k in ("x", "down", "up"))


@on_each
def test_compiled_it_is_the_reference(device):
    torch._dynamo.reset()
    made, w = tensors(device, torch.float32, "x down up")
    fast = torch.compile(
        lambda x: lowrank.linear(x, w, made["bias"], made["down"], made["up"], 0.5), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(
        fast(made["x"]), lowrank.linear(made["x"], w, made["bias"], made["down"], made["up"], 0.5)
    )


class Dense:
    """A quantised weight's two faces, that count how often they are looked at."""

    def __init__(self, w, bias):
        self.w, self.bias, self.made = w.detach(), bias.detach(), 0

    def product(self, x):
        return torch.nn.functional.linear(x, self.w, self.bias)

    def weight(self):
        self.made += 1
        return self.w.clone()

    def quantised(self):
        return lowrank.Quantised(self.product, self.weight)


@on_each
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_quantised_weight_is_made_in_the_backward_pass_alone(dropout, device):
    made, w = tensors(device, trained="x down up")
    dense = Dense(w, made["bias"])
    leaves = [made[k] for k in ("x", "down", "up")]

    def run(x, down, up):
        return lowrank.linear(x, dense.quantised(), None, down, up, 0.7, dropout, seed=3)

    assert torch.autograd.gradcheck(run, leaves)
    want = lowrank.linear(made["x"], w.detach(), made["bias"].detach(), made["down"], made["up"], 0.7, dropout, seed=3)
    dense.made, kept = 0, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        got = run(*leaves)
    torch.testing.assert_close(got, want)
    assert dense.made == 0 and (OUT, IN) not in kept
    got.sum().backward()
    assert dense.made == 1
    run(made["x"].detach(), *leaves[1:]).sum().backward()
    assert dense.made == 1  # no gradient of the input, no weight
