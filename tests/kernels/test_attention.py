"""Blocked attention against a mask written token by token, in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.kernels import attention
from deltatune.kernels.attention import Blocks, attend

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def tensors(blocks, heads=4, kv=2, d=3, dtype=torch.float64, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    sizes = (heads, kv, kv)
    return [torch.randn(1, n, blocks.total, d, generator=g, dtype=dtype).to(device).requires_grad_() for n in sizes]


def sees(blocks, i, j):
    """Whether token i attends to token j, from the lengths alone."""

    def document(t):
        t -= blocks.shared
        for n, length in enumerate(blocks.lengths):
            if t < length:
                return -1 if t < 0 else n
            t -= length

    return j <= i and (j < blocks.shared or document(i) == document(j))


def explicit(q, k, v, blocks, scale):
    rows = []
    for h in range(q.shape[1]):
        kh = h // (q.shape[1] // k.shape[1])
        for i in range(blocks.total):
            js = [j for j in range(blocks.total) if sees(blocks, i, j)]
            p = torch.softmax(torch.stack([q[0, h, i] @ k[0, kh, j] for j in js]) * scale, 0)
            rows.append(sum(w * v[0, kh, j] for w, j in zip(p, js, strict=True)))
    return torch.stack(rows).view(q.shape[1], blocks.total, -1).transpose(0, 1)[None]


layouts = st.builds(Blocks, st.integers(0, 4), st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))


@settings(max_examples=30, deadline=None)
@given(layouts, st.sampled_from([(4, 2), (2, 2), (3, 1)]), st.sampled_from([1, 2, 3, 128]))
def test_outputs_and_gradients(blocks, heads, piece):
    old, attention.PIECE = attention.PIECE, piece
    try:
        blocks = Blocks(blocks.shared, blocks.lengths)
        q, k, v = tensors(blocks, *heads)
        got = attend(q, k, v, blocks, 0.6)
        want = explicit(q, k, v, blocks, 0.6)
        torch.testing.assert_close(got, want)
        g = torch.randn_like(want)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True):
            torch.testing.assert_close(a, b)
    finally:
        attention.PIECE = old


def test_gradcheck():
    blocks = Blocks(2, (3, 1, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, blocks), tensors(blocks))


def masked(q, k, v, blocks, scale=None):
    """By torch, with a mask, in double precision."""
    mask = torch.tensor([[sees(blocks, i, j) for j in range(blocks.total)] for i in range(blocks.total)])
    q, k, v = (t.double() for t in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.to(q.device), scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blocks", [Blocks(24, (300, 129, 1, 128)), Blocks(0, (5, 70))], ids=["long", "short"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_single_precision_and_its_gradients_agree_with_a_mask(blocks, heads, device):
    q, k, v = tensors(blocks, *heads, 16, torch.float32, device=device)
    got, want = attend(q, k, v, blocks), masked(q, k, v, blocks)
    near = {"atol": 2e-6, "rtol": 1e-5} if device == "cpu" else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(got.double(), want, **near)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(device)
    mine, theirs = torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_the_products_in_its_precision(device):
    blocks = Blocks(3, (5, 130, 2))
    q, k, v = tensors(blocks, 4, 2, 16, torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = attend(q, k, v, blocks)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), masked(q, k, v, blocks), atol=0.05, rtol=0.05)
    got.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_flex_attention_has_the_same_layout(device):
    blocks = Blocks(3, (5, 130, 2))
    q, k, v = (t.detach() for t in tensors(blocks, 4, 2, 16, torch.float32, device=device))
    got = attention.flex_attention(q, k, v, block_mask=blocks.mask(q.device), scale=0.25, enable_gqa=True)
    torch.testing.assert_close(got.transpose(1, 2), attend(q, k, v, blocks, 0.25), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.transpose(1, 2).double(), masked(q, k, v, blocks, 0.25), atol=1e-5, rtol=1e-4)
    assert blocks.mask(q.device) is blocks.mask(q.device)


def cells(blocks):
    """Pairs of a query and a key that are multiplied."""
    piece = attention.PIECE
    return sum(n * piece * (g.shared + (i + 1) * piece) for g in blocks.groups[0] for i, n in enumerate(g.counts))


def test_nothing_is_computed_across_documents():
    assert cells(Blocks(0, (128,) * 8)) == 8 * (64 * 64 + 64 * 128)
    assert math.isclose(cells(Blocks(0, (1024,))) / 1024**2, 0.5 + 0.5 / 16)  # of the future, only what is in a piece
    assert cells(Blocks(10, (64, 1, 200))) == 64 * 64 + 2 * 64 * 74 + 64 * (74 + 138 + 202 + 266)


def test_padding_is_limited_whatever_the_lengths():
    blocks = Blocks(0, (1024, 20, 30, 100, 600, 64, 65, 500))
    assert sum(g.queries.numel() for g in blocks.groups[0]) <= 2 * (
        blocks.total + len(blocks.lengths) * attention.PIECE
    )


def test_a_wrong_length_is_refused():
    q, k, v = tensors(Blocks(0, (4,)))
    with pytest.raises(ValueError, match="4 queries for a layout of 5 tokens"):
        attend(q, k, v, Blocks(1, (4,)))
