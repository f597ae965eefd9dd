"""What every method promises on a quantised base: a tiny Llama in each kind of storage."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import table
import torch
from table import METHODS, MOVED_AT_START, QUANTISED, REFUSED, batch, logits, loss, model, perturb

import deltatune as dt
from deltatune.models.loading import load_base
from deltatune.models.quantise import KINDS, dequantise
from deltatune.storage import layers
from deltatune.train.proof import checksums

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

FEW = ("lora", "dora", "ia3", "houlsby", "prefix")
ALL = METHODS | QUANTISED
HERE = [m for m in ALL if (m, "llama") not in REFUSED]
CASES = [(m, k) for k in KINDS for m in HERE if k in ("nf4", "int8") or m in FEW]
REWRITING = {"lora, loftq, 3 iterations", "lora, qpissa", "lora, qpissa, 2 iterations"}  # the base, while attached


def cases(among):
    marks = {(m, k): () if k == "nf4" or m in FEW else (pytest.mark.slow,) for m, k in among}
    return pytest.mark.parametrize("method,kind", [pytest.param(*c, marks=marks[c]) for c in among])


case = cases(CASES)
every = pytest.mark.parametrize("kind", KINDS)


@cache
def _folder():
    """Kept, for what reads the weights as they were before quantisation."""
    folder = TemporaryDirectory()
    model("llama").save_pretrained(folder.name)
    return folder


@cache
def _loaded(kind, dtype=torch.float32):
    return load_base(_folder().name, quantize=kind, dtype=dtype)


def base(kind, dtype=torch.float32):
    net = copy.deepcopy(_loaded(kind, dtype))
    for module in net.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.train()  # or its inputs are rounded as well, to 8 bits, which no delta does
    return net


def calm(adapter):
    """A unit takes its module's mode; see `base`."""
    for _, unit in adapter.units():
        unit.eval()
    return adapter


def attach(*given):
    return calm(table.attach(*given))


def dequantised(kind, method, adapter):
    """The weights that the codes stand for, under the same adapter."""
    net = dequantise(base(kind), torch.float32)
    twin = dt.attach(net, replace(ALL[method], init=None) if method in QUANTISED else ALL[method])
    calm(twin).load_state_dict(adapter.state_dict())
    return net


def bits(net):
    """Every stored value of the base, as it is stored."""
    found = {}
    for name, t in net.state_dict().items():
        if "adapters" in name.split("."):
            continue
        inner = t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else None
        for part in inner or [None]:
            found[f"{name}.{part}"] = (t.as_subclass(torch.Tensor) if part is None else getattr(t, part)).clone()
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@case
def test_the_start_is_the_base_and_only_the_adapter_trains(method, kind):
    net = base(kind)
    given, before = batch(net), bits(net)
    want = logits(net, given).detach()
    adapter = attach(net, ALL[method])
    held = bits(net)
    assert same(held, before) is (method not in REWRITING)
    sums = checksums(net, {id(p) for p in adapter.parameters()})
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    if method not in MOVED_AT_START | QUANTISED.keys():
        torch.testing.assert_close(logits(net, given), want, atol=5e-5, rtol=1e-4)
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=1e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(net, given)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 1e-3
    assert same(bits(net), held) and checksums(net, {id(p) for p in adapter.parameters()}) == sums
    dt.detach(net)
    assert same(bits(net), before) and torch.equal(logits(net, given), want)


@cases([(m, k) for m, k in CASES if m not in REWRITING])
def test_the_adapter_is_the_one_of_the_dequantised_base(method, kind):
    """Outputs and gradients are those that the same adapter has on the weights that the codes stand for."""
    net = base(kind)
    torch.manual_seed(0)
    adapter = perturb(attach(net, ALL[method]))
    given, found = batch(net, 40), []
    for one in (net, dequantised(kind, method, adapter)):
        torch.manual_seed(0)
        out = logits(one, given)
        loss(one, given).backward()
        found.append([out, *(p.grad for p in dt.adapters(one)["default"].parameters())])
    noise = 1e-7 * max(want.abs().max().item() for want in found[1])  # a key's bias has no gradient but this
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4 * want.abs().max().item() + noise, rtol=1e-3)


@case
def test_merging_rounds_and_unmerging_is_exact(method, kind):
    net = base(kind)
    given = batch(net)
    adapter = perturb(attach(net, ALL[method]))
    want, held = logits(net, given), bits(net)
    if not adapter.mergeable:
        return
    rounded = sum(at == "weight" and layers.is_quantised(m) for _, m, _, at in adapter.sites())
    with pytest.warns(UserWarning, match=f"merged into {rounded} quantised") if rounded else nullcontext():
        lost = dt.merge(net)
    assert 0 < lost < 2 if rounded else lost == 0
    assert torch.allclose(logits(net, given), want, atol=1e-4) is not bool(rounded)
    dt.unmerge(net)
    assert same(bits(net), held) and torch.equal(logits(net, given), want)
    if method in REWRITING:
        return
    plain = dequantised(kind, method, adapter)
    torch.testing.assert_close(logits(plain, given), want, atol=1e-4 * want.abs().max().item(), rtol=1e-3)
    want = logits(plain, given)
    assert dt.merge(plain) == 0
    assert (logits(plain, given) - want).abs().max() <= 1e-5 * want.abs().max()


@case
def test_save_and_load_give_the_same_output(method, kind, tmp_path):
    net = base(kind)
    given = batch(net)
    perturb(attach(net, ALL[method], "mine")).save(tmp_path)
    other = base(kind)
    calm(dt.load(other, tmp_path))
    torch.testing.assert_close(logits(other, given), logits(net, given), atol=1e-5, rtol=1e-5)


@every
def test_the_proof_sees_a_code_that_changes(kind):
    net = base(kind)
    attach(net, dt.LoRA(r=4))
    sums = checksums(net, set())
    w = net.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        getattr(w, "qdata", w.data).view(-1)[0] += 1
    changed = {n for n, crc in checksums(net, set()).items() if crc != sums[n]}
    assert changed == {"model.layers.1.mlp.up_proj.weight"}


@every
def test_a_copy_is_independent(kind):
    net = base(kind)
    given = batch(net)
    perturb(attach(net, dt.LoRA(r=4)))
    want = logits(net, given)
    twin = copy.deepcopy(net)
    with pytest.warns(UserWarning):
        dt.merge(twin)
    torch.testing.assert_close(logits(net, given), want, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["lora", "ia3", "houlsby", "parallel", "prefix"])
@every
def test_a_fast_forward_never_dequantises_for_the_adapter(method, kind, monkeypatch):
    net = base(kind)
    perturb(attach(net, METHODS[method]))
    read, count = layers.read, []

    def counted(module, param):
        count.append(param == "weight" and layers.is_quantised(module))
        return read(module, param)

    monkeypatch.setattr(layers, "read", counted)
    logits(net, batch(net))
    assert not any(count)
    dt.detach(net)
    attach(net, dt.DoRA())
    logits(net, batch(net))
    assert sum(count) >= 14  # the norm of every row needs them all


@every
def test_biases_are_replaced_beside_the_library_s_own_product(kind):
    torch.manual_seed(0)
    net = base(kind)
    q = net.model.layers[0].self_attn.q_proj
    q.bias = torch.nn.Parameter(torch.randn(len(layers.read(q, "weight"))), requires_grad=False)
    x = torch.randn(2, 3, 32)
    plain = q(x)
    adapter = attach(net, dt.Union(methods=(dt.BitFit(targets="q_proj"), dt.LoRA(r=2, targets="q_proj"))))
    torch.testing.assert_close(q(x), plain)
    perturb(adapter)
    w, b = layers.read(q, "weight"), q.bias
    for _, m, unit, at in adapter.sites():
        if m is q:
            w, b = (w, unit.weight(b)) if at == "bias" else (unit.weight(w), b)
    torch.testing.assert_close(q(x), torch.nn.functional.linear(x, w, b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@every
def test_activation_checkpointing_gives_the_same_gradients(kind, reentrant):
    net = base(kind).train()
    given = batch(net)
    adapter = perturb(attach(net, dt.LoRA(r=4)))
    loss(net, given).backward()
    want = [p.grad.clone() for p in adapter.parameters()]
    net.zero_grad()
    net.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        net.enable_input_require_grads()
    loss(net, given).backward()
    for p, g in zip(adapter.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method,kind",
    [pytest.param(m, k, marks=() if (m, k) in {("lora", "nf4"), ("ia3", "int8")} else (pytest.mark.slow,))
     for m in ("lora", "dora", "ia3") for k in KINDS],
)  # fmt: skip
def test_compiles_into_one_graph(method, kind):
    torch._dynamo.reset()
    net = base(kind)
    given = batch(net)
    perturb(attach(net, METHODS[method]))
    want = logits(net, given)
    got = torch.compile(net, fullgraph=True, backend="eager")(**given).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby", "prefix"])
@every
def test_a_base_that_computes_in_bf16(method, kind):
    net = base(kind, torch.bfloat16)
    given = batch(net)
    want = logits(net, given)
    adapter = attach(net, METHODS[method])
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    got = logits(net, given)
    assert got.dtype == torch.bfloat16
    if method not in MOVED_AT_START:
        torch.testing.assert_close(got, want, atol=0.15, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss(net, given).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())


@every
def test_rows_of_a_batch_under_their_own_adapters(kind):
    net = base(kind)
    given = batch(net, 3)
    perturb(attach(net, dt.LoRA(r=4), "a"), 1)
    perturb(attach(net, dt.IA3(), "b"), 2)
    with dt.using(net, router=dt.PerRow(["a", "b", None])):
        got = logits(net, given)
    for i, names in enumerate((("a",), ("b",), ())):
        with dt.using(net, *names):
            torch.testing.assert_close(got[i], logits(net, given)[i], atol=1e-4, rtol=1e-4)


@every
def test_the_plan_counts_weights_and_not_codes(kind):
    assert dt.plan(base(kind), dt.LoRA(r=4)).total == dt.plan(model("llama"), dt.LoRA(r=4)).total


def test_a_weight_packed_for_one_kernel_is_read_and_refuses_to_be_merged():
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    w = net[0].weight.detach()
    net[0].weight = torch.nn.Parameter(Int4OpaqueTensor.from_hp(w, [1, 32]), requires_grad=False)
    adapter = perturb(attach(net, dt.LoRA(r=2, targets="0")))
    read = layers.read(net[0], "weight")
    assert read.shape == w.shape and (read - w).abs().max() < 0.02
    x = torch.randn(5, 64)
    ((_, unit),) = adapter.units()
    torch.testing.assert_close(net(x), x @ unit.weight(read).T, atol=1e-4, rtol=1e-4)
    with pytest.raises(dt.DeltatuneError, match="0: Int4OpaqueTensor is packed for one kernel"):
        dt.merge(net)
    torch.testing.assert_close(net(x), x @ unit.weight(read).T, atol=1e-4, rtol=1e-4)


def test_a_weight_packed_anew_by_the_first_call_is_unpacked_to_train():
    """On a CPU with bf16 units, bitsandbytes rearranges a weight when it is first used without gradients."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    net = torch.nn.Sequential(Linear4bit(64, 64, bias=False, quant_type="nf4")).to("cpu")
    want, codes = layers.read(net[0], "weight"), net[0].weight.data.clone()
    net[0].support_avx512bf16_for_cpu = True
    net[0].weight.data, _ = _convert_weight_packed_for_cpu(net[0].weight.data, net[0].weight.quant_state)
    attach(net, dt.LoRA(r=2, targets="0"))
    assert torch.equal(net[0].weight.data, codes) and not net[0].support_avx512bf16_for_cpu
    torch.testing.assert_close(layers.read(net[0], "weight"), want, atol=0.02, rtol=0.02)
    net.train()(torch.randn(2, 64)).sum().backward()


def test_nothing_is_imported_before_it_is_needed():
    import subprocess
    import sys

    code = "import sys, deltatune; print({'bitsandbytes', 'torchao', 'transformers', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_kinds_with_room_for_what_they_say():
    """Bytes of the stored weights against the arithmetic that `deltatune plan` uses."""
    from deltatune.models.quantise import quantisable, saved_bytes

    plain = model("llama", hidden_size=256, intermediate_size=512)
    with TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        for kind in KINDS:
            net = load_base(folder, quantize=kind, dtype=torch.float32)
            stored = sum(t.numel() * t.element_size() for name, t in bits(net).items() if "quant_" not in name)
            whole = sum(p.numel() * p.element_size() for p in plain.parameters())
            n = sum(m.weight.numel() for m in quantisable(plain, kind))
            told = (whole - stored) / saved_bytes(plain, kind)
            assert told == pytest.approx(1, rel=1e-3), kind
            if kind == "nf4":
                assert 8 * (stored - (whole - 4 * n)) / n == pytest.approx(4.127, abs=1e-3)
