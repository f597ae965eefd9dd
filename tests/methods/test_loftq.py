"""LoftQ (arXiv:2310.08659) and QPiSSA (arXiv:2404.02948) on a base in NF4, against loops in float64 written here, and
what holds on the other kinds of base."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.inits.loftq import alternate
from deltatune.models.loading import load_base
from deltatune.models.quantise import dequantise
from deltatune.models.tiny import inputs, tiny
from deltatune.storage import layers

pytest.importorskip("bitsandbytes")

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def dynamic() -> np.ndarray:
    """The 256 values that scales are rounded to: a sign, a decade, and the midpoints of its linear fraction."""
    positive = [(e[:-1] + e[1:]) / 2 * 10.0 ** (i - 6) for i in range(7) if len(e := np.linspace(0.1, 1, 2**i + 1))]
    values = np.concatenate(positive)
    return np.sort(np.concatenate([values, -values, [0.0, 1.0]]))


def nearest(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return codes[np.abs(x[..., None] - codes).argmin(-1)]


def quantised(w: np.ndarray) -> np.ndarray:
    """NF4 with double quantisation, as QLoRA defines it."""
    blocks = w.reshape(-1, 64)
    c = np.abs(blocks).max(1)
    mean = c.mean()
    groups = np.pad(c - mean, (0, -len(c) % 256)).reshape(-1, 256)
    second = np.abs(groups).max(1, keepdims=True)
    rounded = (nearest(groups / second, dynamic()) * second).reshape(-1)[: len(c)] + mean
    return (nearest(blocks / c[:, None], NF4) * rounded[:, None]).reshape(w.shape)


def best(w: np.ndarray, r: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]) @ vt[:r]


def alternating(w: np.ndarray, r: int, iterations: int) -> list[float]:
    product, errors = np.zeros_like(w), []
    for _ in range(iterations):
        q = quantised(w - product)
        product = best(w - q, r)
        errors.append(float(np.linalg.norm(w - q - product)))
    return errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path):  # type: ignore[no-untyped-def]
    return load_base(folder, quantize="nf4", dtype=torch.float32)


@pytest.fixture
def net(loaded):  # type: ignore[no-untyped-def]
    return copy.deepcopy(loaded)


def whole(folder: Path):  # type: ignore[no-untyped-def]
    return load_base(folder, dtype=torch.float32)


def gaps(net, adapter, folder) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """|W - (Q + s B A)| at every site, W as it is in the file."""
    full, found = whole(folder), {}
    for path, module, unit, _ in adapter.sites():
        w, q = full.get_submodule(path).weight.double(), layers.read(module, "weight").double()
        found[path] = torch.linalg.matrix_norm(w - unit.weight(q)).item()
    return found


def bits(net) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Every stored value of the base, as it is stored."""
    found = {}
    for k, v in net.state_dict().items():
        parts = v.__tensor_flatten__()[0] if hasattr(v, "__tensor_flatten__") else ()
        stored = {f"{k}.{part}": getattr(v, part) for part in parts} or {k: v.as_subclass(torch.Tensor)}
        found.update({name: t.clone() for name, t in stored.items() if "adapters" not in name})
    return found


def same(one, other) -> bool:  # type: ignore[no-untyped-def]
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_the_quantiser_of_the_reference_is_the_base_s(net, folder) -> None:  # type: ignore[no-untyped-def]
    w = whole(folder).model.layers[0].mlp.up_proj.weight
    got = layers.read(net.model.layers[0].mlp.up_proj, "weight").numpy()
    off = np.abs(got - quantised(w.detach().double().numpy()))
    assert np.mean(off > 1e-6) < 2e-3  # values on the border of two codes may fall either way


@pytest.mark.parametrize("alpha", [8.0, 16.0])
def test_the_error_falls_with_iterations_as_in_float64(net, folder, alpha) -> None:  # type: ignore[no-untyped-def]
    w = whole(folder).model.layers[1].mlp.down_proj.weight.detach().double().numpy()
    plain, reference = np.linalg.norm(w - quantised(w)), alternating(w, 8, 5)
    errors = []
    for t in range(1, 6):
        twin = copy.deepcopy(net)
        init = dt.LoftQ(iterations=t)
        adapter = dt.attach(twin, dt.LoRA(r=8, alpha=alpha, init=init, targets="layers.1.mlp.down_proj"))
        errors += gaps(twin, adapter, folder).values()
    assert errors == sorted(errors, reverse=True) and errors[4] < 0.97 * errors[0] < errors[0] < 0.9 * plain
    np.testing.assert_allclose(errors, np.minimum.accumulate(reference), rtol=5e-3)


def test_the_best_of_the_iterations_is_kept() -> None:
    """A quantiser that fails at its third use, as few bits do by themselves."""

    class Site:
        written: list[torch.Tensor] = []
        weight = torch.zeros(6, 5)

        def write(self, w: torch.Tensor) -> None:
            self.written.append(w)
            self.weight = torch.zeros(6, 5) if len(self.written) == 2 else w.sign() * w.abs().mean()

    torch.manual_seed(0)
    w, site = torch.randn(6, 5), Site()
    _, delta = next(dt.attach(torch.nn.Sequential(torch.nn.Linear(5, 6)), dt.LoRA(r=2, targets="0")).units())
    site.weight = w.sign() * w.abs().mean()
    b, a = alternate(dt.LoftQ(iterations=3), delta, site, w, 3, None)  # type: ignore[arg-type]
    left = torch.linalg.matrix_norm(w - site.weight - delta.s * b @ a)
    assert len(site.written) == 3 and torch.equal(site.written[2], site.written[0])  # the second of three was best
    sigma = torch.linalg.svdvals(w - site.weight)
    torch.testing.assert_close(left, sigma[2:].norm(), rtol=1e-4, atol=0)


def test_one_iteration_takes_the_leading_part_of_what_rounding_lost(net, folder) -> None:  # type: ignore[no-untyped-def]
    before = bits(net)
    adapter = dt.attach(net, dt.LoRA(r=4, init=dt.LoftQ()))
    assert same(bits(net), before)
    full = whole(folder)
    for path, module, unit, _ in adapter.sites():
        lost = full.get_submodule(path).weight.double() - layers.read(module, "weight").double()
        sigma = torch.linalg.svdvals(lost)
        left = torch.linalg.matrix_norm(lost - unit.s * unit.b.double() @ unit.a.double()) ** 2
        torch.testing.assert_close(left, sigma[4:].square().sum(), rtol=1e-4, atol=0)
        torch.testing.assert_close(unit.b.T @ unit.b, unit.a @ unit.a.T, atol=1e-5, rtol=1e-4)


def test_the_model_starts_nearer_to_the_one_that_was_quantised(net, folder) -> None:  # type: ignore[no-untyped-def]
    given, full = inputs(net, batch=8), whole(folder)
    want = full(**given).logits
    started = {}
    for name, init in (("qlora", None), ("loftq", dt.LoftQ()), ("loftq, 5", dt.LoftQ(iterations=5)),
                       ("qpissa", dt.QPiSSA()), ("qpissa, 5", dt.QPiSSA(iterations=5))):  # fmt: skip
        twin = copy.deepcopy(net)
        dt.attach(twin, dt.LoRA(r=16, init=init))
        started[name] = ((twin(**given).logits - want).norm() / want.norm()).item()
    assert started["loftq, 5"] < started["loftq"] < started["qlora"], started
    assert started["qpissa, 5"] < started["qpissa"] < started["qlora"], started


@pytest.mark.parametrize("init", [dt.LoftQ(), dt.LoftQ(iterations=3), dt.QPiSSA(), dt.QPiSSA(iterations=3)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "torchao-int8", "torchao-int4"])
def test_on_other_codes_the_start_is_nearer_and_detaching_is_exact(kind, init, folder) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torchao")
    net, full = load_base(folder, quantize=kind, dtype=torch.float32), whole(folder)
    given, before = inputs(net), bits(net)
    want, apart = net(**given).logits, {}
    for path, m in full.named_modules():
        if layers.is_quantised(at := net.get_submodule(path)):
            apart[path] = torch.linalg.matrix_norm(m.weight.double() - layers.read(at, "weight").double()).item()
    adapter = dt.attach(net, dt.LoRA(r=16, init=init))
    rewritten = isinstance(init, dt.QPiSSA) or init.iterations > 1
    assert same(bits(net), before) is not rewritten
    started = gaps(net, adapter, folder)
    assert started.keys() == apart.keys() and all(started[path] < 0.9 * apart[path] for path in apart)
    assert (net(**given).logits - full(**given).logits).norm() < 0.9 * (want - full(**given).logits).norm()
    dt.detach(net)
    assert same(bits(net), before) and torch.equal(net(**given).logits, want)


def test_a_weight_that_the_codes_hold_exactly_needs_no_factors(net, tmp_path) -> None:  # type: ignore[no-untyped-def]
    dequantise(copy.deepcopy(net), torch.float32).save_pretrained(tmp_path)
    adapter = dt.attach(net, dt.LoRA(r=4, init=dt.LoftQ(source=str(tmp_path))))
    assert max((u.b @ u.a).abs().max().item() for _, u in adapter.units()) < 1e-6
    with pytest.raises(dt.DeltatuneError, match="detach them first"):
        dequantise(net, torch.float32)


def test_rewriting_lasts_as_long_as_the_adapter(net, folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    given, before = inputs(net), bits(net)
    want = net(**given).logits
    method = dt.LoRA(r=4, init=dt.LoftQ(iterations=3))
    adapter = dt.attach(net, method, "mine")
    assert not same(bits(net), before)
    started = net(**given).logits
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.1)
    out = net(**given).logits
    adapter.save(tmp_path / "a")
    other = load_base(folder, quantize="nf4", dtype=torch.float32)
    dt.load(other, tmp_path / "a")
    torch.testing.assert_close(other(**given).logits, out)
    with pytest.raises(dt.DeltatuneError, match="its weight is that of adapter 'mine'; unmerge or detach it first"):
        dt.attach(net, method, "second")
    dt.attach(net, dt.LoRA(r=4), "over")
    with pytest.warns(UserWarning):
        dt.merge(net, "over")
    with pytest.raises(dt.DeltatuneError, match="adapter 'over' was merged over 'mine'"):
        dt.detach(net, "mine")
    dt.unmerge(net, "over")
    dt.activate(net, "mine")
    with pytest.warns(UserWarning):
        dt.merge(net, "mine")
    dt.unmerge(net)
    torch.testing.assert_close(net(**given).logits, out, atol=0, rtol=0)
    dt.detach(net)
    assert same(bits(net), before) and torch.equal(net(**given).logits, want)
    twin = copy.deepcopy(net)
    dt.attach(twin, method)
    torch.testing.assert_close(twin(**given).logits, started)
    with pytest.warns(UserWarning):
        dt.merge(twin, keep=False)  # for good
    assert not same(bits(twin), before) and not dt.adapters(twin)


def test_trained_it_is_an_ordinary_lora_that_loads_without_the_source(net, folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = shutil.copytree(folder, tmp_path / "source")
    adapter = dt.attach(net, dt.LoRA(r=4, init=dt.LoftQ(source=str(source))))
    given = inputs(net)
    out = net(**given).logits
    adapter.save(tmp_path / "a")
    shutil.rmtree(source)
    other = load_base(folder, quantize="nf4", dtype=torch.float32)
    dt.load(other, tmp_path / "a")
    torch.testing.assert_close(other(**given).logits, out)


def test_qpissa_quantises_the_residual(net, folder) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    adapter = dt.attach(net, dt.LoRA(r=8, alpha=4, init=dt.QPiSSA(), targets=("q_proj", "up_proj")))
    full = whole(folder)
    for path, module, unit, _ in adapter.sites():
        w = full.get_submodule(path).weight.detach().double().numpy()
        sigma = np.linalg.svd(w, compute_uv=False)[:8]
        want = torch.tensor(np.diag(sigma) / unit.s)
        torch.testing.assert_close((unit.b.T @ unit.b).double(), want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((unit.a @ unit.a.T).double(), want, atol=1e-5, rtol=1e-4)
        off = np.abs(layers.read(module, "weight").double().numpy() - quantised(w - best(w, 8)))
        assert np.mean(off > 1e-5) < 5e-3
        error = gaps(net, adapter, folder)[path]
        assert error < 0.95 * np.linalg.norm(w - quantised(w))


@pytest.mark.parametrize("init", [dt.LoftQ, dt.QPiSSA])
def test_the_randomised_decomposition_is_nearly_as_good(net, folder, init) -> None:  # type: ignore[no-untyped-def]
    errors = []
    for niter in (None, 8):
        twin = copy.deepcopy(net)
        torch.manual_seed(0)
        adapter = dt.attach(twin, dt.LoRA(r=8, init=init(iterations=2, niter=niter), targets="gate_proj"))
        errors.append(sum(gaps(twin, adapter, folder).values()))
    assert errors[1] == pytest.approx(errors[0], rel=2e-2)


def test_pissa_on_a_quantised_base_starts_at_it(net) -> None:  # type: ignore[no-untyped-def]
    given, before = inputs(net), bits(net)
    want = net(**given).logits
    adapter = dt.attach(net, dt.LoRA(r=4, init=dt.PiSSA(niter=4)))
    torch.testing.assert_close(net(**given).logits, want, atol=5e-5, rtol=1e-4)
    assert same(bits(net), before) and all(u.b.any() for _, u in adapter.units())


def test_what_is_wrong_is_said_and_nothing_is_left(net, folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    before = bits(net)
    with pytest.raises(dt.DeltatuneError, match=r"LoftQ: model\..*\.q_proj is not quantised; .*PiSSA"):
        dt.attach(whole(folder), dt.LoRA(init=dt.LoftQ(), targets="q_proj"))
    with pytest.raises(dt.DeltatuneError, match=f"before quantisation is not in {tmp_path}; give the init `source`"):
        dt.attach(net, dt.LoRA(init=dt.LoftQ(source=str(tmp_path))))
    with pytest.raises(dt.DeltatuneError, match="is not in nobody/nothing"):
        dt.attach(net, dt.LoRA(init=dt.LoftQ(source="nobody/nothing")))
    with pytest.raises(dt.DeltatuneError, match="QPiSSA: r=40, .*give r <= 32"):
        dt.attach(net, dt.LoRA(r=40, init=dt.QPiSSA(), targets=("q_proj", "k_proj")))
    for init, least in ((dt.LoftQ, 0), (dt.QPiSSA, -1)):
        with pytest.raises(dt.DeltatuneError, match="iterations must"):
            init(iterations=least)
    assert same(bits(net), before) and not dt.adapters(net)
    net.name_or_path = ""
    assert dt.plan(net, dt.LoRA(r=4, init=dt.LoftQ(iterations=2))).trained > 0  # shapes alone need no weights


def test_weights_under_another_prefix_and_in_another_orientation(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    full = tiny("gpt2", n_embd=64)
    full.transformer.save_pretrained(tmp_path / "a")  # without the head, as GPT-2 itself is published
    full.save_pretrained(tmp_path / "b", max_shard_size="100kB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    for source in ("a", "b"):
        net = load_base(tmp_path / "b", quantize="nf4", dtype=torch.float32)
        adapter = dt.attach(net, dt.LoRA(r=4, init=dt.LoftQ(source=str(tmp_path / source)), targets="attn.c_proj"))
        for path, module, unit, _ in adapter.sites():
            w, q = full.get_submodule(path).weight.T, layers.read(module, "weight")
            assert (w - unit.weight(q)).norm() < 0.97 * (w - q).norm()
