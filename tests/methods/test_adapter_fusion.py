"""AdapterFusion: the attention over adapters, the two stages of training, files with and without adapters, pruning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs_of import documents, run_on_llama
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import deltatune as dt
from deltatune.core import Run
from deltatune.data import Batches
from deltatune.methods.side_by_side import Fusion
from deltatune.models.tiny import inputs, tiny
from deltatune.routers.adapter_fusion import FusionAttention, FusionRegularisation
from deltatune.train import Recipe, TrainOptions, fit, run

DRAWN = dt.NearIdentity(std=0.2)


def bottleneck(kind: str, size: int = 6) -> dt.core.Method:
    return dt.Houlsby(size=size, norms=None, init=DRAWN) if kind == "houlsby" else dt.Pfeiffer(size=size, init=DRAWN)


def with_adapters(family: str, kind: str, names: str = "abc", same: bool = False) -> Any:
    torch.manual_seed(0)
    model = tiny(family)
    for i, name in enumerate(names):
        torch.manual_seed(0 if same else i)
        dt.attach(model, bottleneck(kind, 6 if same else 4 + i), name)
    return model


def shake(adapter: dt.Adapter, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * std)


def fusions(adapter: dt.Adapter) -> list[Fusion]:
    return [unit for _, unit in adapter.units() if isinstance(unit, Fusion)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_equation_token_by_token() -> None:
    torch.manual_seed(0)
    model = Block().double()
    for name in "abc":
        dt.attach(model, dt.Houlsby(size=3, targets="down", norms=None, init=dt.NearIdentity(std=1.0)), name)
    cores = [{n.rpartition(".")[2]: p.detach() for n, p in a.named_parameters()} for a in dt.adapters(model).values()]
    adapter = dt.attach(model, dt.AdapterFusion(adapters=["a", "b", "c"]), "fused")
    shake(adapter)
    w = {n.rpartition(".")[2]: p.detach() for n, p in adapter.named_parameters()}
    assert w.keys() == {"query", "key", "value", "query_bias", "key_bias"}
    x = torch.randn(5, 6, dtype=torch.double)
    model.eval()
    for row, y in zip(x, model(x), strict=True):
        u = model.down.weight @ row + model.down.bias
        z = [c["up"] @ gelu_tanh(c["down"] @ u + c["down_bias"]) + c["up_bias"] for c in cores]
        q = w["query"] @ u + w["query_bias"]
        s = [math.exp(q @ (w["key"] @ one + w["key_bias"])) for one in z]
        want = u + sum(s[n] / sum(s) * (w["value"] @ z[n]) for n in range(3))
        torch.testing.assert_close(y, want, atol=1e-12, rtol=0)


def test_dropout_is_on_the_scores() -> None:
    """A dropped score is zero, not gone: it still has a weight."""
    torch.manual_seed(0)
    router = FusionAttention(4, dropout=0.5).double().train()
    x, z = torch.randn(1, 4, dtype=torch.double), torch.randn(1, 3, 4, dtype=torch.double)
    with torch.no_grad():
        router.query.normal_(std=0.4)
        router.key.normal_(std=0.4)
    q = x[0] @ router.query.T
    scores = (z[0] @ router.key.T) @ q
    seen = set()
    for _ in range(60):
        a = router.weights(x, z)[0]
        kept = [m for m in range(8) if torch.allclose(
            a, (scores * torch.tensor([2.0 * (m >> i & 1) for i in range(3)])).softmax(-1))]  # fmt: skip
        assert len(kept) == 1
        seen |= set(kept)
    assert len(seen) == 8
    router.eval()
    torch.testing.assert_close(router.weights(x, z)[0], scores.softmax(-1))


def test_the_start() -> None:
    torch.manual_seed(0)
    router = FusionAttention(200)
    off = router.value[~torch.eye(200, dtype=torch.bool)]
    assert (router.value.diagonal() == 1).all() and torch.equal(off, torch.full_like(off, 1e-6))
    for p in (router.query, router.key):
        assert abs(p.std().item() - 0.02) < 2e-4 and abs(p.mean().item()) < 5e-4
    assert not router.query_bias.any() and not router.key_bias.any()
    assert not torch.equal(router.query, router.key)


def test_parameter_count_of_the_paper() -> None:
    """L (3 d^2 + 2 d): 21.25 million for BERT-base, with Pfeiffer's adapters."""
    with torch.device("meta"):
        bert = BertModel(BertConfig())
    found = dt.plan(bert, dt.AdapterFusion(adapters=("a", "b"), methods=(dt.Pfeiffer(), dt.Pfeiffer())))
    assert found.trained == 12 * (3 * 768**2 + 2 * 768) == 21_252_096


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_one_adapter_is_itself_and_many_the_same_are_one(family: str, kind: str) -> None:
    model = with_adapters(family, kind, same=True)
    batch = inputs(model)
    base = (dt.activate(model), model(**batch).logits)[1]
    dt.activate(model, "a")
    want = model(**batch).logits
    assert (want - base).abs().max() > 0.01
    one = dt.attach(model, dt.AdapterFusion(adapters=["a"]), "one")
    torch.testing.assert_close(model(**batch).logits, want, atol=3e-5, rtol=1e-5)
    shake(one)
    shaken = model(**batch).logits
    many = dt.attach(model, dt.AdapterFusion(adapters=["a", "b", "c"]), "many")
    many.load_state_dict({**many.state_dict(), **dict(one.named_parameters())})
    torch.testing.assert_close(model(**batch).logits, shaken, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_the_order_of_the_adapters_permutes_the_weights_which_sum_to_one(kind: str) -> None:
    model = with_adapters("llama", kind)
    batch = inputs(model)
    found: dict[str, Any] = {}
    for order in ("abc", "cab"):
        adapter = dt.attach(model, dt.AdapterFusion(adapters=tuple(order)), order)
        if found:
            adapter.load_state_dict({**adapter.state_dict(), **dict(dt.adapters(model)["abc"].named_parameters())})
        else:
            shake(adapter)
        with dt.AdapterFusion.attention(adapter) as seen:
            logits = model(**batch).logits
        found[order] = logits, seen
    torch.testing.assert_close(found["abc"][0], found["cab"][0], atol=1e-5, rtol=1e-4)
    one, other = found["abc"][1], found["cab"][1]
    assert len(one) == (4 if kind == "houlsby" else 2) and one.keys() == other.keys()
    for path, (a,) in one.items():
        assert a.shape == (*batch["input_ids"].shape, 3) and a.std() > 0.01
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))
        torch.testing.assert_close(a[..., [2, 0, 1]], other[path][0], atol=1e-5, rtol=1e-4)
    assert all(unit.attention.seen is None for unit in fusions(adapter))


def test_the_penalty_against_a_loop_and_no_decay_of_the_values() -> None:
    model = with_adapters("llama", "pfeiffer")
    adapter = dt.attach(model, dt.AdapterFusion(adapters=["a", "b"], regularisation=0.3), "fused")
    assert adapter.callbacks() == [FusionRegularisation(weight=0.3)]
    shake(adapter)
    (events,) = (c.start(run := Run(model, adapter, 1)) for c in adapter.callbacks())
    run.share = 0.25
    values = [unit.attention.value for unit in fusions(adapter)]
    want = sum((v[i, j].item() - (i == j)) ** 2 for v in values for i in range(32) for j in range(32))
    got = events.on_loss(run, torch.tensor(2.0))
    assert got.item() == pytest.approx(2 + 0.3 * 0.25 * want, rel=1e-5)
    groups = events.param_groups([{"params": list(adapter.parameters()), "lr": 1.0, "weight_decay": 0.1}])
    kept, free = ([g for g in groups if g["weight_decay"] == decay] for decay in (0.1, 0.0))
    assert {id(p) for g in free for p in g["params"]} == {id(v) for v in values}
    assert sum(len(g["params"]) for g in kept) == 4 * len(values) and all(g["lr"] == 1.0 for g in groups)
    lora = dt.attach(model, dt.LoRA(r=2), "lora")
    with pytest.raises(dt.DeltatuneError, match="use it with AdapterFusion"):
        FusionRegularisation().start(Run(model, lora, 1))


def test_the_second_stage_trains_the_attention_alone() -> None:
    model = with_adapters("llama", "pfeiffer")
    before = {n: {k: t.clone() for k, t in dt.adapters(model)[n].state_dict().items()} for n in "abc"}
    base = {k: t.clone() for k, t in model.state_dict().items() if ".adapters." not in k}
    fused = dt.attach(model, dt.AdapterFusion(adapters=["a", "b", "c"]), "fused")
    start = {k: t.clone() for k, t in fused.state_dict().items()}
    fit(model, fused, Batches(documents(), batch_size=4), options=TrainOptions(max_steps=3, lr=5e-3, precision="fp32"))
    moved = {k.rpartition(".")[2] for k, t in fused.state_dict().items() if not torch.equal(t, start[k])}
    assert moved == {"query", "key", "value", "query_bias", "key_bias"}
    for n in "abc":
        assert all(torch.equal(t, before[n][k]) for k, t in dt.adapters(model)[n].state_dict().items())
    assert all(torch.equal(model.state_dict()[k], t) for k, t in base.items())


def folders(tmp_path: Path, family: str = "llama", kind: str = "pfeiffer") -> list[str]:
    model = with_adapters(family, kind, "ab")
    return [str(a.save(tmp_path / n)) for n, a in dt.adapters(model).items()]


def test_a_run_over_saved_adapters_repeats_after_a_break(tmp_path: Path) -> None:
    adapter, _ = run_on_llama(dt.AdapterFusion(adapters=folders(tmp_path)), tmp_path, stop=3, steps=6)
    assert len(fusions(adapter)) == 2


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_a_file_with_the_adapters_needs_nothing_else(kind: str, tmp_path: Path) -> None:
    model = with_adapters("llama", kind)
    adapter = dt.attach(model, dt.Union(methods=(dt.AdapterFusion(adapters=["a", "c"]), dt.Tune())), "fused")
    shake(adapter)
    want = model(**inputs(model)).logits
    adapter.save(tmp_path / "fused")
    torch.manual_seed(0)
    other = tiny("llama")
    again = dt.load(other, tmp_path / "fused")
    torch.testing.assert_close(other(**inputs(other)).logits, want, atol=0, rtol=0)
    fusion = again.method.methods[0]
    assert fusion.adapters == ("a", "c") and fusion.methods == (bottleneck(kind, 4), bottleneck(kind, 6))
    again.save(tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "fused/adapter_model.safetensors"
    ).read_bytes()


def test_a_file_without_the_adapters_refers_to_them(tmp_path: Path) -> None:
    names = folders(tmp_path)
    model = with_adapters("llama", "pfeiffer", "")
    adapter = dt.attach(model, dt.AdapterFusion(adapters=names, saved="without adapters"), "fused")
    shake(adapter)
    want = model(**inputs(model)).logits
    adapter.save(tmp_path / "fused")
    tensors = load_file(tmp_path / "fused/adapter_model.safetensors")
    assert tensors.keys() == dict(adapter.named_parameters()).keys()
    other = with_adapters("llama", "pfeiffer", "")
    dt.load(other, tmp_path / "fused")
    assert torch.equal(other(**inputs(other)).logits, want)
    dt.detach(other)
    (tmp_path / "b").rename(tmp_path / "moved")
    with pytest.raises(dt.DeltatuneError, match="neither an adapter on the model nor the folder"):
        dt.load(other, tmp_path / "fused")
    assert not dt.adapters(other)


def test_the_adapters_are_copied() -> None:
    model = with_adapters("llama", "pfeiffer")
    dt.attach(model, dt.AdapterFusion(adapters=["a", "b"]), "fused")
    want = model(**inputs(model)).logits
    shake(dt.adapters(model)["a"])
    dt.detach(model, "b")
    dt.activate(model, "fused")
    assert torch.equal(model(**inputs(model)).logits, want)


@pytest.mark.parametrize("saved", ["with adapters", "without adapters"])
def test_pruning_keeps_those_with_the_most_weight(saved: str) -> None:
    model = with_adapters("llama", "houlsby")
    batch = inputs(model)
    method = dt.AdapterFusion(adapters=["a", "b", "c"], saved=saved)
    fused = dt.attach(model, dt.Union(methods=(method, dt.Tune())), "fused")
    shake(fused)
    with dt.AdapterFusion.attention(fused) as seen:
        model(**batch)
        model(**batch)
    assert all(len(found) == 2 for found in seen.values())
    mean = sum(torch.stack(found).mean((0, 1, 2)) for found in seen.values())
    worst = mean.argmin().item()
    kept = [n for i, n in enumerate("abc") if i != worst]
    cut = dt.AdapterFusion.prune(fused, 2, seen, "cut")
    assert list(cut.method.methods[0].adapters) == kept
    got = model(**batch).logits
    want = dt.attach(model, dt.Union(methods=(dt.AdapterFusion(adapters=kept), dt.Tune())), "want")
    want.load_state_dict({**want.state_dict(), **dict(fused.named_parameters())})
    torch.testing.assert_close(got, model(**batch).logits, atol=0, rtol=0)
    with pytest.raises(dt.DeltatuneError, match="of 3 adapters 1 to 3 can be kept, not 4"):
        dt.AdapterFusion.prune(fused, 4, seen, "more")
    with (
        pytest.raises(dt.DeltatuneError, match="'a' is a Houlsby"),
        dt.AdapterFusion.attention(dt.adapters(model)["a"]),
    ):
        pass


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_rows_of_one_batch_under_two_fusions_and_cached_generation(kind: str) -> None:
    model = with_adapters("llama", kind)
    for name, pair in (("one", "ab"), ("two", "bc")):
        shake(dt.attach(model, dt.AdapterFusion(adapters=tuple(pair)), name), 0.2 + 0.3 * (name == "two"))
    ids = inputs(model, batch=3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # left padding
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    alone = {}
    for name in ("one", "two"):
        dt.activate(model, name)
        alone[name] = model.generate(ids, **options)
        assert torch.equal(alone[name], model.generate(ids, use_cache=False, **options))
    dt.activate(model, router=dt.PerRow(["two", "one", "two"]))
    mixed = model.generate(ids, **options)
    for i, name in enumerate(["two", "one", "two"]):
        assert torch.equal(mixed[i], alone[name][i])
    assert not torch.equal(alone["one"], alone["two"])


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    model = with_adapters("llama", "houlsby")
    types = [type(m) for m in model.modules()]
    others = {
        "norms": dt.Houlsby(size=4),
        "lora": dt.LoRA(r=2),
        "elsewhere": dt.Houlsby(size=4, norms=None, targets=dt.Part("down")),
        "parallel": dt.ParallelAdapter(size=4, targets=dt.Part("o", "down")),
        "prompt": dt.PromptTuning(length=2),
        "tuned": dt.Union(methods=(bottleneck("houlsby"), dt.Tune(targets=dt.Part("embedding")))),
    }
    why = {
        "norms": "'norms' is Houlsby and Tune, not one bottleneck at each of its modules",
        "lora": "'lora' is LoRA, not one bottleneck",
        "elsewhere": "only one of 'a' and 'elsewhere' is at 'model.layers.0.self_attn.o_proj'",
        "parallel": "only one of 'a' and 'parallel' is at",
        "prompt": "only one of 'a' and 'prompt' is at",
        "tuned": "'tuned' is Houlsby and Tune",
        "d": "'d' is neither an adapter on the model nor the folder",
        "aa": "did you mean 'a'",
    }
    for name, method in others.items():
        dt.attach(model, method, name)
    for name, told in why.items():
        with pytest.raises(dt.DeltatuneError, match=told):
            dt.attach(model, dt.AdapterFusion(adapters=["a", name]), "fused")
        assert "fused" not in dt.adapters(model)
    for alone, told in (("prompt", "has no bottleneck"), ("parallel", "has no bottleneck")):
        with pytest.raises(dt.DeltatuneError, match=told):
            dt.attach(model, dt.AdapterFusion(adapters=[alone]), "fused")
    dt.detach(model, *others)
    assert [type(m) for m in model.modules()] == types
    for wrong, told in (
        ({}, "adapters are those to fuse, each once"),
        ({"adapters": ["a", "a"]}, "each once"),
        ({"adapters": ["a"], "targets": "down_proj"}, "leave targets='down_proj' out"),
        ({"adapters": ["a"], "dropout": 1.0}, "dropout must lie in"),
        ({"adapters": ["a"], "saved": "no"}, "saved is 'with adapters' or"),
        ({"adapters": ["a", "b"], "methods": [dt.Pfeiffer()]}, "one for each of adapters"),
    ):
        with pytest.raises(dt.DeltatuneError, match=told):
            dt.AdapterFusion(**wrong)


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    names = folders(tmp_path)
    model = tiny("llama", hidden_size=16, intermediate_size=32)
    with pytest.raises(dt.DeltatuneError, match="does not fit 'model.layers.0'"):
        dt.attach(model, dt.AdapterFusion(adapters=names))


def test_two_stages_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of two tasks, each with its head, and a fusion for a third, from folders that its recipe names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=32, **size)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    runs = {
        "one": ("good bad", {"name": "pfeiffer", "size": 4}),
        "two": ("red green blue", {"name": "pfeiffer", "size": 4}),
        "fused": ("yes no", {"name": "adapter_fusion", "adapters": ["runs/one/adapter", "runs/two/adapter"]}),
    }
    for name, (words, method) in runs.items():
        rows = [{"text": f"{word} {i}", "label": word} for i in range(4) for word in words.split()]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome = run(Recipe.of({
            "base": "base", "data": f"{name}.jsonl", "method": method, "output": f"runs/{name}",
            "train": {"max_steps": 2, "lr": 1e-2, "batch_size": 4},
        }))  # fmt: skip
    assert outcome.plan is not None and {"classifier"} <= {site.path for site in outcome.plan.sites}
    config = json.loads(Path("runs/fused/adapter/adapter_config.json").read_text())
    fusion = config["deltatune"]["method"]["methods"][0]
    assert fusion["adapters"] == ["runs/one/adapter", "runs/two/adapter"]
    assert [m["type"] for m in fusion["methods"]] == ["Pfeiffer", "Pfeiffer"]
    saved = load_file("runs/fused/adapter/adapter_model.safetensors")
    for i, name in enumerate(("one", "two")):
        for key, t in load_file(f"runs/{name}/adapter/adapter_model.safetensors").items():
            if key.rpartition(".")[2] in ("down", "up"):
                place, _, n = key.rpartition(".")
                assert torch.equal(saved[f"{place}.adapters.{i}.{n}"], t) and t.any()
    assert not any(".adapters.0." in key and "classifier" in key for key in saved)
