"""Adapters whose start is taken off, made ordinary LoRAs of twice the rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_data_inits import INITS, fitted

import deltatune as dt
from deltatune.interop.plain_lora import plain_lora
from deltatune.models.tiny import inputs

TAKEN_OFF = {"pissa": dt.PiSSA(), "olora": dt.OLoRA()} | {n: i for n, i in INITS.items() if n != "eva"}


@pytest.mark.parametrize("name", TAKEN_OFF)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_a_start_that_is_taken_off_becomes_an_ordinary_lora_of_twice_the_rank(
    name: str, family: str, scaling: Any
) -> None:
    lora = dt.LoRA(r=4, scaling=scaling, init=TAKEN_OFF[name], ranks={".*0.*": 3}, alphas={".*1.*": 5})
    net, adapter, _ = fitted(lora, family)
    batch, base = inputs(net), {k: v.clone() for k, v in net.state_dict().items() if "adapters" not in k.split(".")}
    want, before = net(**batch).logits, [t.clone() for t in adapter.state_dict().values()]
    plain = plain_lora(adapter, "plain")
    torch.testing.assert_close(net(**batch).logits, want, atol=1e-5, rtol=1e-5)
    assert plain.method.r == 8 and plain.method.init is None and plain.method.scaling == scaling
    ranks = set()
    for (_, unit), (_, had) in zip(plain.units(), adapter.units(), strict=True):
        (now,), (then,) = ([m for m in u.modules() if hasattr(m, "a0")] for u in (unit, had))
        ranks.add(len(then.a))
        assert len(now.a) == now.b.shape[1] == 2 * len(then.a) and now.a0 is None and now.b0 is None
        assert now.s == pytest.approx(then.s, rel=1e-12)
    assert ranks == {3, 4}
    dt.detach(net, "plain")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in base.items())
    assert all(torch.equal(t, u) for t, u in zip(before, adapter.state_dict().values(), strict=True))
    dt.activate(net, "default")
    torch.testing.assert_close(net(**batch).logits, want, atol=0, rtol=0)


@pytest.mark.parametrize("method", [
    dt.DoRA(inner=dt.LoRA(r=4, init=dt.CorDA())),
    dt.Mixture(expert=dt.LoRA(r=4, init=dt.PiSSA()), n=2),
    dt.LongLoRA(r=4, init=dt.OLoRA()),
    dt.Union(methods=(dt.LoRA(r=4, init=dt.PiSSA(), targets="q_proj"), dt.LoRA(r=2, targets="v_proj"), dt.Tune())),
], ids=["dora", "mixture", "longlora", "union"])  # fmt: skip
def test_ordinary_inside_other_methods(method: dt.core.Method) -> None:
    net, adapter, _ = fitted(method)
    batch = inputs(net)
    want = net.eval()(**batch).logits
    plain = plain_lora(adapter, "plain")
    torch.testing.assert_close(net(**batch).logits, want, atol=1e-5, rtol=1e-5)
    assert not [k for k in plain.state_dict() if k.endswith("0")] and type(plain.method) is type(method)
    assert [k for k in adapter.state_dict() if k.endswith(".a0")]


def test_what_is_ordinary_or_cannot_be_is_said() -> None:
    net, adapter, _ = fitted(dt.LoRA(r=4, init=dt.EVA()))
    with pytest.raises(dt.DeltatuneError, match="'default' has no start that is taken off"):
        plain_lora(adapter, "plain")
    dt.detach(net)
    both = (dt.LoRA(r=4, init=dt.EVA(), targets="q_proj"), dt.LoRA(r=4, init=dt.PiSSA(), targets="v_proj"))
    net, adapter, _ = fitted(dt.Union(methods=both))
    with pytest.raises(dt.DeltatuneError, match="does not fit"):
        plain_lora(adapter, "plain")
    assert list(dt.adapters(net)) == ["default"]
