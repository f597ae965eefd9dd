"""EVA, CorDA and LoRA-GA: what their factors are made of, in float64; training, resuming, saving."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltatune as dt
from deltatune.core import start
from deltatune.data import Batches, Example
from deltatune.inits.corda import invertible
from deltatune.inits.eva import Spectrum
from deltatune.models.tiny import inputs, tiny
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions
from deltatune.train.training_data import TrainingData

DOUBLE = torch.double
INITS = {"eva": dt.EVA(), "corda": dt.CorDA(), "corda, preserved": dt.CorDAPreserved(), "lora-ga": dt.LoRAGA()}


class Net(nn.Module):
    """x -> tanh(x W1') W2', and the data that its tests run through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(10, 12).double(), nn.Linear(12, 9).double()
        g = torch.Generator().manual_seed(5)
        self.xs = [torch.randn(30, 10, generator=g, dtype=DOUBLE) * torch.arange(1, 11) ** 2 for _ in range(3)]
        self.targets = [torch.randn(30, 9, generator=g, dtype=DOUBLE) for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x) / 50))

    def losses(self, n: int) -> Iterator[Tensor]:
        return (F.mse_loss(self(x), y) for x, y in islice(zip(self.xs, self.targets, strict=True), n))


def started(init: dt.core.Init, r: int = 3, alpha: float = 6.0, **lora: Any) -> tuple[Net, dict[str, Any]]:
    net = Net()
    adapter = dt.attach(net, dt.LoRA(r=r, alpha=alpha, init=init, targets=("one", "two"), **lora))
    dt.initialise(adapter, net.losses)
    return net, {path: unit for path, _, unit, _ in adapter.sites()}


def fed(net: Net) -> dict[str, Tensor]:
    """What each layer is given, all batches together."""
    with torch.no_grad():
        return {"one": torch.cat(net.xs), "two": torch.cat([torch.tanh(net.one(x) / 50) for x in net.xs])}


@pytest.mark.parametrize("name", INITS)
def test_the_output_starts_at_the_base_and_the_base_is_not_written(name: str) -> None:
    net = Net()
    want, before = net(net.xs[0]), {k: v.clone() for k, v in net.state_dict().items()}
    started_net, units = started(INITS[name])
    torch.testing.assert_close(started_net(net.xs[0]), want, rtol=1e-12, atol=1e-12)
    dt.detach(started_net)
    assert all(torch.equal(v, before[k]) for k, v in started_net.state_dict().items())
    assert all(u.a.any() and u.waits is None for u in units.values())


def test_eva_takes_the_leading_right_singular_vectors_of_the_inputs() -> None:
    net, units = started(dt.EVA(rho=1, tau=1, batches=1))
    for path, x in fed(net).items():
        _, _, vt = torch.linalg.svd(x[:30], full_matrices=False)
        torch.testing.assert_close((units[path].a @ vt[:3].T).abs(), torch.eye(3, dtype=DOUBLE), atol=1e-9, rtol=0)
        assert not units[path].b.any() and units[path].a0 is None


def test_eva_over_batches_is_the_decomposition_of_them_all_as_far_as_it_holds_them() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 5, dtype=DOUBLE))[0].T
    x = torch.randn(90, 5, dtype=DOUBLE) @ (torch.tensor([9.0, 7, 5, 3, 1], dtype=DOUBLE)[:, None] * basis)
    found = Spectrum(5, tau=1.0)
    for rows in x.split(15):
        found.add(rows)
    _, sigma, vt = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(found.sigma, sigma[:5])
    torch.testing.assert_close((found.v @ vt[:5].T).abs(), torch.eye(5, dtype=DOUBLE), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.shares().sum(), torch.ones((), dtype=DOUBLE))


def test_eva_randomised_is_near_the_exact_one_and_leaves_the_generator() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 600))[0] for n in (700, 600))
    x = u @ torch.diag(1.2 ** -torch.arange(600.0)) @ v.T
    state = torch.get_rng_state()
    found = Spectrum(6, tau=1.0)
    found.add(x)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close((found.v @ v[:, :6]).abs(), torch.eye(6), atol=1e-3, rtol=0)


def test_eva_moves_ranks_to_where_shares_of_variance_are_large() -> None:
    net = Net()
    with torch.no_grad():
        net.one.weight[2:] *= 0.01  # two has its variance in two directions
    adapter = dt.attach(net, dt.LoRA(r=3, alpha=9, init=dt.EVA(tau=1, batches=1), targets=("one", "two")))
    dt.initialise(adapter, net.losses)
    shares = {}
    for path, x in fed(net).items():
        sigma = torch.linalg.svdvals(x[:30])
        shares |= {(path, j): float(s**2 / (x[:30] ** 2).sum()) for j, s in enumerate(sigma[:6])}
    best = sorted(shares, key=lambda k: -shares[k])[:6]
    want = {path: sum(p == path for p, _ in best) for path in ("one", "two")}
    assert {path: len(unit.a) for path, _, unit, _ in adapter.sites()} == want != {"one": 3, "two": 3}
    assert all(unit.b.shape[1] == len(unit.a) and unit.s == 3.0 for _, unit in adapter.units())


def test_eva_stops_once_the_directions_stay() -> None:
    net, seen = Net(), []
    adapter = dt.attach(net, dt.LoRA(r=2, init=dt.EVA(tau=0.0), targets="one"))
    dt.initialise(adapter, lambda n: (seen.append(i) or loss for i, loss in enumerate(net.losses(n))))
    assert seen == [0, 1]


def test_corda_trains_the_leading_or_the_last_components_of_w_c() -> None:
    for init, chosen in ((dt.CorDA(), slice(3)), (dt.CorDAPreserved(), slice(-3, None))):
        net, units = started(init)
        for path, x in fed(net).items():
            w, c = getattr(net, path).weight.detach(), x.T @ x
            c += 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=DOUBLE)
            u, sigma, vt = torch.linalg.svd(w @ c, full_matrices=False)
            want = (u[:, chosen] * sigma[chosen]) @ (vt @ torch.linalg.inv(c))[chosen]
            got = units[path].s * units[path].b @ units[path].a
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
            mean = c.diagonal().mean()  # the scale of C that is left open
            torch.testing.assert_close(units[path].b.T @ units[path].b, torch.diag(sigma[chosen] / mean / 2))


def test_corda_of_full_rank_is_the_weight() -> None:
    net, units = started(dt.CorDA(), r=9, alpha=5)
    for path in ("two",):
        torch.testing.assert_close(units[path].s * units[path].b @ units[path].a, getattr(net, path).weight.detach())


def test_corda_of_white_inputs_is_pissa() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False).double())
    white = torch.linalg.qr(torch.randn(40, 8, dtype=DOUBLE))[0]
    ours = dt.attach(net, dt.LoRA(r=3, init=dt.CorDA(), targets="0"), "corda")
    dt.initialise(ours, lambda n: iter([net(white).sum()]))
    theirs = dt.attach(net, dt.LoRA(r=3, init=dt.PiSSA(), targets="0"), "pissa")
    (_, a), (_, b) = *ours.units(), *theirs.units()
    torch.testing.assert_close(a.b @ a.a, b.b @ b.a)
    torch.testing.assert_close(a.a.abs(), b.a.abs())


def test_corda_damps_a_second_moment_that_has_no_inverse() -> None:
    x = torch.randn(4, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    c = x.T @ x
    one = torch.eye(8, dtype=DOUBLE)
    torch.testing.assert_close(invertible(c), (c / c.diagonal().mean() + 0.01 * one) / 1.01)
    rounded = (1e3 * c).float()  # its inverse is none in fp32 until more is added
    assert torch.linalg.matrix_norm(invertible(rounded) @ torch.linalg.inv(invertible(rounded)) - one.float()) < 0.05
    torch.testing.assert_close(invertible(one * 5), one)


def test_the_first_step_of_lora_ga_is_full_fine_tunings_within_rank_2r() -> None:
    lr, r, alpha, gamma = 1e-6, 2, 6.0, 4.0
    full = Net()
    loss = sum(full.losses(3)) / 3  # type: ignore[arg-type]
    loss.backward()
    net, units = started(dt.LoRAGA(gamma=gamma), r=r, alpha=alpha)
    loss = sum(net.losses(3)) / 3  # type: ignore[arg-type]
    loss.backward()
    for path, unit in units.items():
        before = unit.weight(getattr(net, path).weight.detach())
        with torch.no_grad():
            for p in (unit.a, unit.b):
                p -= lr * p.grad
        moved = unit.weight(getattr(net, path).weight.detach()) - before
        g = getattr(full, path).weight.grad
        u, sigma, vt = torch.linalg.svd(g, full_matrices=False)
        c2 = len(g) ** 0.5 / gamma
        want = -lr * (alpha / r) ** 2 * c2 * (u[:, : 2 * r] * sigma[: 2 * r]) @ vt[: 2 * r]
        torch.testing.assert_close(moved, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        torch.testing.assert_close(unit.a @ unit.a.T, c2 * torch.eye(r, dtype=DOUBLE))


def test_lora_ga_leaves_no_gradient_and_takes_several_passes_when_memory_is_short(monkeypatch: Any) -> None:
    _, whole = started(dt.LoRAGA())
    calls: list[int] = []
    net = Net()
    monkeypatch.setattr(start, "HELD", 1)
    adapter = dt.attach(net, dt.LoRA(r=3, alpha=6.0, init=dt.LoRAGA(), targets=("one", "two")))
    dt.initialise(adapter, lambda n: (calls.append(n), net.losses(n))[1])
    assert calls == [8, 8] and all(p.grad is None for p in net.parameters())
    for path, _, unit, _ in adapter.sites():
        torch.testing.assert_close(unit.b @ unit.a, whole[path].b @ whole[path].a)


def test_padding_is_left_out() -> None:
    net = tiny("llama")
    batch = inputs(net, 2, 8)
    longer = {k: F.pad(v, (0, 5)) for k, v in batch.items()}
    found = []
    for given in (batch, longer):
        adapter = dt.attach(net, dt.LoRA(r=4, init=dt.EVA(rho=1), targets="q_proj"))
        dt.initialise(adapter, lambda n, given=given: iter([net(**given).logits.sum()]))
        found.append([u.a.detach() for _, u in adapter.units()])
        dt.detach(net)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close((one @ two.T).abs(), torch.eye(4), atol=1e-4, rtol=0)


def docs(n: int = 12) -> list[Example]:
    return [Example(ids := [(7 * i + 3 * j) % 90 + 3 for j in range(10)], list(ids), f"d:{i}") for i in range(n)]


def fitted(method: dt.core.Method, family: str = "llama", output: Any = None, steps: int = 3, **more: Any) -> Any:
    torch.manual_seed(0)
    net = tiny(family)
    adapter = dt.attach(net, method)
    task = "seq2seq" if net.config.is_encoder_decoder else "causal"
    options = TrainOptions(lr=1e-2, batch_size=4, **{"max_steps": steps} | more.pop("options", {}))
    if any(init.apart for init in start.waiting(adapter)):
        others = Batches(docs()[::-1], batch_size=2, task=task)
        dt.initialise(adapter, TrainingData(net, others, torch.device("cpu"), torch.float32).losses)
    result = fit(net, adapter, Batches(docs(), batch_size=4, task=task), options=options, output=output, **more)
    return net, adapter, result


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_trained_by_fit_and_loaded_again(name: str, family: str, tmp_path: Any) -> None:
    net, adapter, _ = fitted(dt.LoRA(r=4, init=INITS[name]), family)
    batch = inputs(net)
    want = net(**batch).logits
    with dt.using(net):
        assert (net(**batch).logits - want).abs().max() > 1e-2
    adapter.save(tmp_path)
    dt.detach(net)
    dt.load(net, tmp_path)
    torch.testing.assert_close(net(**batch).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [
    dt.DoRA(inner=dt.LoRA(r=4, init=dt.EVA())),
    dt.Mixture(expert=dt.LoRA(r=4, init=dt.CorDA()), n=2),
    dt.Union(methods=(dt.LoRA(r=4, init=dt.EVA(), targets="q_proj"), dt.LoRA(r=2, init=dt.LoRAGA(), targets="v_proj"))),
], ids=["dora", "mixture", "union"])  # fmt: skip
def test_inside_other_methods_and_in_our_own_format(method: dt.core.Method, tmp_path: Any) -> None:
    net, adapter, _ = fitted(method)
    batch = inputs(net)
    want, state = net(**batch).logits, {k: v.clone() for k, v in adapter.state_dict().items()}
    assert all(getattr(u, "waits", None) is None for _, unit in adapter.units() for u in unit.modules())
    other = tiny("llama")
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "adapters" not in k})
    again = dt.attach(other, method)
    again.load_state_dict(state)
    torch.testing.assert_close(other(**batch).logits, want)
    adapter.save(tmp_path)
    dt.detach(net)
    loaded = dt.load(net, tmp_path)
    torch.testing.assert_close(net(**batch).logits, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(dt.DeltatuneError, match="nothing in it waits for data"):
        dt.initialise(loaded, lambda n: iter([]))


@pytest.mark.parametrize("name", INITS)
def test_a_resumed_run_is_not_started_again_and_goes_on_bit_for_bit(name: str, tmp_path: Any) -> None:
    method = dt.LoRA(r=4, init=INITS[name])
    _, whole, _ = fitted(method, output=tmp_path / "whole", steps=6, options={"save_every": 3})

    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record.get("step") == 4:
            raise Stop

    with pytest.raises(Stop):
        fitted(method, output=tmp_path / "cut", steps=6, options={"save_every": 3}, report=stop)
    _, resumed, _ = fitted(method, output=tmp_path / "cut", steps=6, options={"save_every": 3}, resume=True)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    if name == "eva":
        assert len({len(unit.a) for _, unit in resumed.units()}) > 1


def test_processes_start_from_the_same_batches() -> None:
    found = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(0)
        net = tiny("llama")
        adapter = dt.attach(net, dt.LoRA(r=4, init=dt.LoRAGA(batches=2)))
        data = TrainingData(
            net, Batches(docs(), batch_size=3, rank=rank, world=world), torch.device("cpu"), torch.float32
        )
        dt.initialise(adapter, data.losses)
        found.append(adapter.state_dict())
    assert all(torch.equal(found[0][k], other[k]) for other in found[1:] for k in other)


def test_errors() -> None:
    net = Net()
    adapter = dt.attach(net, dt.LoRA(r=3, init=dt.EVA(), targets="one"))
    (events,) = [c.start(None) for c in adapter.callbacks()]  # type: ignore[arg-type]
    with pytest.raises(dt.DeltatuneError, match=r"EVA starts from data.*deltatune.initialise"):
        events.on_train_start(dt.core.Run(net, adapter, 5))
    events.on_train_start(dt.core.Run(net, adapter, 5, step=2))  # resumed
    with pytest.raises(dt.DeltatuneError, match="'one': 1 directions for r=3: give more batches"):
        dt.initialise(adapter, lambda n: iter([net(net.xs[0][:1]).sum()]))
    with pytest.raises(dt.DeltatuneError, match="do not fit the weight"):
        adapter.load_state_dict({"one.0.a": torch.ones(2, 9), "one.0.b": torch.ones(12, 2)})
    with pytest.raises(dt.DeltatuneError, match="do not fit the weight"):
        adapter.load_state_dict({"one.0.a": torch.ones(2, 10)})
    dt.detach(net)
    with pytest.raises(dt.DeltatuneError, match=r"'two': r=6, weight \(9, 12\): give r <= 4"):
        started(dt.LoRAGA(), r=6)
    with pytest.raises(dt.DeltatuneError, match=r"CorDA: 'two': r=10, .*give r <= 9"):
        started(dt.CorDA(), r=10)
    adapter = dt.attach(net, dt.LoRA(r=2, init=dt.LoRAGA(), targets="two"))
    with pytest.raises(dt.DeltatuneError, match="no gradient reached 'two'"):
        dt.initialise(adapter, lambda n: iter([net.one(net.xs[0]).sum().requires_grad_()]))
    embedding = tiny("llama")
    adapter = dt.attach(embedding, dt.LoRA(r=2, init=dt.EVA(), targets=dt.Part("embedding")))
    with pytest.raises(dt.DeltatuneError, match=r"'model.embed_tokens' is a Embedding, no linear layer"):
        dt.initialise(adapter, lambda n: iter([]))
    for wrong in (
        lambda: dt.EVA(rho=0.5),
        lambda: dt.EVA(tau=2),
        lambda: dt.LoRAGA(gamma=0),
        lambda: dt.CorDA(batches=0),
    ):
        with pytest.raises(dt.DeltatuneError, match="got|give"):
            wrong()
