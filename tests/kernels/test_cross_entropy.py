"""Chunked cross-entropy: equal to the whole in double precision, and smaller than it in every tensor that it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.kernels.cross_entropy import CHUNK, Loss, head_cross_entropy, linear_cross_entropy
from deltatune.kernels.device import standing_for

IGNORED = -100
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0,
          cap: float | None = None, smoothing: float = 0.0) -> Tensor:  # fmt: skip
    """The definition, with all logits at once, in double precision."""
    z = scale * F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    z = z if cap is None else cap * torch.tanh(z / cap)
    z, targets = z.flatten(0, -2), targets.flatten()
    return F.cross_entropy(z, targets, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)


def by_calls(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any) -> Loss:
    return head_cross_entropy(lambda x: F.linear(x, weight, bias), hidden, targets, **options)


WAYS = {"weight": linear_cross_entropy, "calls": by_calls}
Way = Callable[..., Loss]


def drawn(n: int, h: int, vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu",
          trained: str = "hidden weight bias") -> dict[str, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (n, h), "weight": (vocabulary, h), "bias": (vocabulary,)}
    made = {k: torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for k, s in shapes.items()}
    made = {k: t.requires_grad_(k in trained.split()) for k, t in made.items()}
    return made | {"targets": torch.randint(vocabulary, (n,), generator=g).to(device)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradients_in_double_precision(way: Way, cap: float | None, smoothing: float) -> None:
    made = drawn(7, 4, 6)
    made["targets"][[1, 4]] = IGNORED

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"scale": 0.7, "cap": cap, "smoothing": smoothing, "chunk": 2 * 6 * 8}
        return way(hidden, weight, made["targets"], bias, **options).total

    assert torch.autograd.gradcheck(total, [made[k] for k in ("hidden", "weight", "bias")])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_shape_is_the_whole(data: st.DataObject) -> None:
    n, h, vocabulary = (data.draw(st.integers(1, most), name) for most, name in ((40, "n"), (9, "h"), (30, "vocab")))
    trained = data.draw(st.sets(st.sampled_from(["hidden", "weight", "bias"])), "trained")
    kept = data.draw(st.lists(st.booleans(), min_size=n, max_size=n), "kept")
    scale, cap = data.draw(st.sampled_from([1.0, 0.25, 3.0]), "scale"), data.draw(st.sampled_from([None, 2.0]), "cap")
    smoothing, biased = data.draw(st.sampled_from([0.0, 0.1, 1.0]), "smoothing"), data.draw(st.booleans(), "biased")
    dtype, chunk = data.draw(st.sampled_from([torch.float32, torch.float64])), data.draw(st.integers(1, 9000), "chunk")
    way, device = data.draw(st.sampled_from(list(WAYS.values()))), data.draw(st.sampled_from(DEVICES))
    made = drawn(n, h, vocabulary, dtype, data.draw(st.integers(0, 99)), device, " ".join(trained))
    made["targets"][~torch.tensor(kept)] = IGNORED
    leaves = {k: made[k] for k in ("hidden", "weight", *["bias"] * biased)}
    options: dict[str, Any] = {"scale": scale, "cap": cap, "smoothing": smoothing}

    found = way(**leaves, targets=made["targets"], **options, chunk=chunk)
    want = whole(**leaves, targets=made["targets"], **options)
    near = {"rtol": 2e-5, "atol": 2e-5} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(found.total.double(), want, **near)
    assert found.targets == sum(kept) and found.total.dtype is dtype
    z = F.linear(*(t.detach().double() for t in leaves.values()))[torch.tensor(kept)] * scale
    z, own = z if cap is None else cap * torch.tanh(z / cap), made["targets"][torch.tensor(kept), None]
    margin = z.gather(1, own) - z.scatter(1, own, -torch.inf).amax(1, keepdim=True)
    assert (margin > 1e-5).sum() <= found.correct <= (margin > -1e-5).sum()  # a cap brings large logits together
    train = {k: t for k, t in leaves.items() if k in trained}
    assert found.total.requires_grad == bool(train) or not sum(kept)
    if train and sum(kept):
        mine = torch.autograd.grad(3 * found.total, list(train.values()))
        for name, one, other in zip(train, mine, torch.autograd.grad(3 * want, list(train.values())), strict=True):
            assert one.dtype is dtype
            torch.testing.assert_close(one, other, msg=lambda m, name=name: f"{name}: {m}", **near)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 4, 5), (6, 4, 1)])
def test_batches_and_the_edges(way: Way, shape: tuple[int, int, int], device: str) -> None:
    made = drawn(*shape, device=device)
    hidden, targets = made["hidden"][None], made["targets"][None]
    found = way(hidden, made["weight"], targets, made["bias"])
    torch.testing.assert_close(found.total, whole(hidden, made["weight"], targets, made["bias"]))
    assert found.targets == shape[0] and (shape[2] > 1 or found.correct == shape[0])
    targets = torch.full_like(targets, IGNORED)
    nothing = way(hidden, made["weight"], targets, made["bias"])
    assert (nothing.total, nothing.targets, nothing.correct) == (0, 0, 0)
    (gradient,) = torch.autograd.grad(nothing.total, made["hidden"])
    assert not gradient.any() and gradient.shape == made["hidden"].shape
    assert way(hidden, made["weight"], targets * 0 - 1, ignored=-1).targets == 0


def test_a_token_that_is_known_keeps_its_loss_and_gradient() -> None:
    """At a margin of 30 nats 1 - p is 1e-13, which fp32 cannot see: there log p is 0, and so is p - 1."""
    hidden = torch.eye(3)[:1].requires_grad_()
    weight = torch.tensor([[30.0, 0, 0], [0, 2, 0], [-1, 0, 1]])
    targets = torch.tensor([0])
    assert F.cross_entropy(hidden @ weight.T, targets) == 0
    found = linear_cross_entropy(hidden, weight, targets).total
    want = whole(twin := hidden.detach().double().requires_grad_(), weight, targets)
    exact = float(torch.log1p(torch.exp(torch.tensor([-30.0, -31.0]).double()).sum()))
    assert found.item() == pytest.approx(exact, rel=1e-5) and exact > 0
    mine, other = torch.autograd.grad(found, hidden)[0], torch.autograd.grad(want, twin)[0]
    torch.testing.assert_close(mine.double(), other, rtol=1e-2, atol=0)  # the definition's own digits end here


class Seen(TorchDispatchMode):
    """What each operation returned: its name, its number of elements, its type."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.made.append((func.overloadpacket.__name__, t.numel(), t.dtype))
        return out


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("trained", "cap"), [("hidden", None), ("hidden", 2.0), ("hidden weight bias", None)])
def test_no_tensor_is_as_large_as_the_logits(way: Way, trained: str, cap: float | None) -> None:
    n, h, vocabulary, rows = 96, 2, 64, 5
    made = drawn(2 * n, h, vocabulary, torch.float32, trained=trained)
    made["targets"][n:] = IGNORED
    with Seen() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kept: list[Tensor] = []
        found = way(made["hidden"], made["weight"], made["targets"], made["bias"], cap=cap,
                    chunk=rows * vocabulary * 4)  # fmt: skip
        found.total.backward()
    assert max(numel for _, numel, _ in seen.made) <= max(rows * vocabulary, 2 * n * h) < n * vocabulary / 15
    assert max(t.numel() for t in kept) <= n * h  # and a head's gradient, which is smaller here
    if trained == "hidden":  # the head's gradient is not made, nor its weight copied
        made_of_weight = {name for name, numel, _ in seen.made if numel == vocabulary * h}
        assert made_of_weight <= {"t", "permute", "detach"}  # views


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_gradients_logits_are_multiplied_once(way: Way) -> None:
    made = drawn(12, 4, 10, trained="hidden weight bias")
    products = {"mm", "addmm", "addmm_", "addmv_"}
    with torch.no_grad(), Seen() as seen:
        found = way(made["hidden"], made["weight"], made["targets"], chunk=10 * 8 * 4)
    count = sum(name in products for name, _, _ in seen.made)
    assert not found.total.requires_grad and count == 3 + (way is by_calls)  # calls look at one row first
    torch.testing.assert_close(found.total, whole(made["hidden"], made["weight"], made["targets"]).detach())


def test_a_tie_is_no_hit() -> None:
    weight = torch.tensor([[1.0], [1.0], [0.0]])
    found = linear_cross_entropy(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    assert found.correct == 0
    assert linear_cross_entropy(torch.ones(1, 1), weight[1:], torch.tensor([0])).correct == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("target", [0, 1])
def test_a_logit_that_is_no_number_shows(way: Way, bad: float, target: int) -> None:
    weight = torch.tensor([[bad], [1.0], [0.0]])
    found = way(torch.ones(1, 1), weight, torch.tensor([target])).total
    want = F.cross_entropy(torch.tensor([[bad, 1.0, 0.0]]), torch.tensor([target]))
    assert found.isfinite() == want.isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_products_run_in_autocasts_precision_and_the_softmax_in_fp32(
    way: Way, stored: torch.dtype, device: str
) -> None:
    made = drawn(30, 16, 50, stored, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=stored is torch.float32), Seen() as seen:
        found = way(made["hidden"], made["weight"], made["targets"], made["bias"], chunk=7 * 50 * 4)
        logits = F.linear(made["hidden"], made["weight"], made["bias"])
    assert {dtype for name, _, dtype in seen.made if name in ("mm", "addmm", "addmm_")} == {torch.bfloat16}
    assert {dtype for name, _, dtype in seen.made if name in ("exp", "exp_", "amax")} == {torch.float32}
    want = F.cross_entropy(logits.float(), made["targets"], reduction="sum")
    assert found.total.dtype is torch.float32
    torch.testing.assert_close(found.total, want, rtol=2e-3, atol=0)
    leaves = [made[k] for k in ("hidden", "weight", "bias")]
    for mine, other in zip(torch.autograd.grad(found.total, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert mine.dtype is stored
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_autocast_leaves_double_precision_alone() -> None:
    made = drawn(5, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(made["hidden"], made["weight"], made["targets"], made["bias"]).total
    torch.testing.assert_close(found, whole(made["hidden"], made["weight"], made["targets"], made["bias"]))


def test_a_heads_gradient_is_summed_in_fp32() -> None:
    """In bf16, 1 is lost beside 256."""
    n = 600
    hidden, weight = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    weight.requires_grad_()
    for way in WAYS.values():
        (gradient,) = torch.autograd.grad(
            way(hidden, weight, torch.zeros(n, dtype=torch.long), chunk=2 * 4).total, weight
        )
        torch.testing.assert_close(gradient.float(), torch.tensor([[-n / 2], [n / 2]]))


def test_backward_may_come_twice() -> None:
    made = drawn(9, 4, 6)
    leaves = [made[k] for k in ("hidden", "weight", "bias")]
    total = linear_cross_entropy(made["hidden"], made["weight"], made["targets"], made["bias"]).total
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total / 4, leaves)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one / 4, other)


def test_a_head_called_by_chunks_sends_gradients_wherever_its_weight_comes_from() -> None:
    """Its factors made once, outside, from parameters of another module: the graph they share outlives each chunk."""
    made = drawn(11, 4, 6, trained="hidden")
    g = torch.Generator().manual_seed(3)
    up, seed, down = (torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((6, 2), (3,), (2, 4)))
    maker = torch.randn(8, 3, generator=g, dtype=torch.float64)
    made_down = (maker @ seed.exp()).tanh().view(2, 4) * down
    leaves = [made["hidden"], up, seed, down]

    def head(x: Tensor) -> Tensor:
        return F.linear(x, made["weight"]) + F.linear(F.linear(x, made_down), up)

    found = head_cross_entropy(head, made["hidden"], made["targets"], chunk=3 * 6 * 4).total
    want = whole(made["hidden"], made["weight"] + up @ made_down, made["targets"])
    torch.testing.assert_close(found, want)
    mine = torch.autograd.grad(found, leaves)
    for one, other in zip(mine, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_a_parameter_that_only_some_rows_use_is_refused() -> None:
    made, extra = drawn(6, 4, 5), torch.ones((), dtype=torch.float64, requires_grad=True)

    def head(x: Tensor) -> Tensor:
        return F.linear(x, made["weight"]) * (extra if len(x) > 1 else 1.0)

    with pytest.raises(RuntimeError, match="1 parameters part of some rows' graph only"):
        head_cross_entropy(head, made["hidden"], made["targets"])


def test_shapes_are_enough_on_the_meta_device() -> None:
    hidden = torch.empty(6, 4, device="meta", requires_grad=True)
    weight, targets = torch.empty(9, 4, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    with standing_for("cpu", torch.bfloat16), Seen() as seen:
        linear_cross_entropy(hidden, weight, targets).total.backward()
    assert ("addmm_", 6 * 9, torch.bfloat16) in seen.made
    assert hidden.grad is not None and hidden.grad.shape == (6, 4)


def test_a_chunk_is_as_large_as_its_bytes_allow() -> None:
    made = drawn(1000, 2, 1024, torch.float32)
    with Seen() as seen:
        linear_cross_entropy(made["hidden"], made["weight"], made["targets"], chunk=300 * 1024 * 4)
    assert {numel for name, numel, _ in seen.made if name == "addmm_" and numel != 1024 * 2} == {250 * 1024}
    assert CHUNK["cpu"] == 64 * 2**20
