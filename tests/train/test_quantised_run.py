"""A run on a quantised base: what its folder says, what it needs, and what merging it gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_run import ROWS, _base, _jsonl
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import deltatune as dt
from deltatune.cli.main import app
from deltatune.core import DeltatuneError, load
from deltatune.models.loading import load_base
from deltatune.storage import layers
from deltatune.train import Recipe, run
from deltatune.train.memory import Shape, estimate
from deltatune.train.merged import quantised, write_merged
from deltatune.train.options import TrainOptions

pytest.importorskip("bitsandbytes")
GB = 10**9


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(_base(tmp_path / "base")),
        "quantize": "nf4",
        "data": {"train": _jsonl(tmp_path / "rows.jsonl", ROWS), "eval": 2, "max_length": 64},
        "train": {"max_steps": 3, "tokens_per_step": 128, "lr": 1e-2, "optimizer": "paged_adamw_8bit"},
        "output": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "torchao-int4"])
def test_a_run_on_a_quantised_base(recipe: dict[str, Any], kind: str) -> None:
    outcome = run(Recipe.of(recipe | {"quantize": kind}))
    assert outcome.result.proof is not None and "the base is unchanged" in outcome.result.proof
    config = json.loads((outcome.saved / "adapter_config.json").read_text())
    assert config["deltatune"]["quantize"] == kind == quantised([outcome.saved])
    assert Recipe.read(Path(recipe["output"]) / "recipe.yaml").quantize == kind


def test_chat_and_merge_use_the_base_that_was_trained_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = run(Recipe.of(recipe)).saved
    ids = torch.arange(3, 20)[None]
    net = load_base(recipe["base"], dtype="float32", quantize="nf4")
    load(net, folder)
    want = net(ids).logits
    done = write_merged(recipe["base"], [folder], tmp_path / "merged")
    assert done.written.relative < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, want, atol=1e-4, rtol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    from deltatune.cli.session import open_session

    session = open_session(None, [str(folder)])
    assert any(layers.is_quantised(m) for m in session.model.modules())
    torch.testing.assert_close(session.model(ids).logits, want, atol=1e-4, rtol=1e-4)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["deltatune"]["quantize"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DeltatuneError, match="bases stored differently .*: nf4, .*: not quantised"):
        quantised([folder, other])


def test_merging_into_four_bits_is_measured(recipe: dict[str, Any]) -> None:
    """A small change is rounded away; one of the size of the codes is not."""
    torch.manual_seed(0)
    losses = []
    for size in (1e-3, 3e-2, 1.0):
        net = load_base(recipe["base"], dtype="float32", quantize="nf4")
        adapter = dt.attach(net, dt.LoRA(r=8))
        with torch.no_grad():
            for role, p in adapter.roles():
                p.copy_(torch.randn_like(p) * (size if role == "up" else 1.0) / p.shape[1] ** 0.5)
        net.requires_grad_(False)
        changes = {path: unit.weight(layers.read(m, "weight")) for path, m, unit, _ in adapter.sites()}
        before = {path: layers.read(m, "weight") for path, m, _, _ in adapter.sites()}
        with pytest.warns(UserWarning, match="quantised weights: rounding them again lost"):
            losses.append(dt.merge(net))
        gap = sum(float((layers.read(net.get_submodule(p), "weight") - w).square().sum()) for p, w in changes.items())
        change = sum(float((w - before[p]).square().sum()) for p, w in changes.items())
        assert losses[-1] == pytest.approx((gap / change) ** 0.5, rel=1e-5)
    assert losses[0] > 0.9 and losses[2] < 0.2 and losses == sorted(losses, reverse=True), losses


def test_plan_shows_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    told = CliRunner().invoke(app, ["plan", str(file), "--json"])
    plain = CliRunner().invoke(app, ["plan", str(file), "quantize=null", "--json"])
    one, two = json.loads(told.stdout), json.loads(plain.stdout)
    assert one["quantize"] == "nf4" and two["quantize"] is None and one["total"] == two["total"]
    assert one["memory"]["base"] < two["memory"]["base"] and one["memory"]["backward"] > two["memory"]["backward"]
    assert "base in nf4: 4-bit NormalFloat" in CliRunner().invoke(app, ["plan", str(file)]).stdout


def test_what_is_wrong_is_said_with_its_remedy(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeltatuneError, match="recipe: quantize: method full trains the weights"):
        Recipe.of(recipe | {"method": "full"})
    with pytest.raises(DeltatuneError, match="quantize: input should be 'nf4', 'int8', .*, got 'nf5'"):
        Recipe.of(recipe | {"quantize": "nf5"})
    with pytest.raises(DeltatuneError, match="quantize: 'nf5' is not one of nf4, .*did you mean 'nf4'"):
        load_base(recipe["base"], quantize="nf5")
    net = load_base(recipe["base"], quantize="nf4", dtype="float32")
    net.save_pretrained(Path(recipe["base"]).parent / "small")
    with pytest.raises(DeltatuneError, match="small is quantised already; leave it out"):
        load_base(Path(recipe["base"]).parent / "small", quantize="nf4")
    with pytest.raises(
        DeltatuneError, match="torchao-int8 finds no layer in GPT2LMHeadModel to quantise; use nf4 or int8"
    ):
        from deltatune.models.tiny import tiny

        tiny("gpt2").save_pretrained(Path(recipe["base"]).parent / "gpt2")
        load_base(Path(recipe["base"]).parent / "gpt2", quantize="torchao-int8")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a))
    for wrong in (recipe, recipe | {"quantize": None}):
        with pytest.raises(
            DeltatuneError, match=r"needs bitsandbytes, which is not installed: pip install 'deltatune\[q"
        ):
            run(Recipe.of(wrong))


def _llama(**size: int) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **size), dtype=torch.bfloat16)


def test_65_billion_parameters_on_one_card_of_48_gb() -> None:
    """QLoRA's arithmetic: 780 GB to train them in 16 bits with Adam, less than 48 GB with NF4 and LoRA of rank 64."""
    size = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    model = _llama(**size)
    n = sum(p.numel() for p in model.parameters())
    assert n == 65_285_660_672 and n * (2 + 2 + 4 + 4) > 780 * GB
    options = TrainOptions(activation_checkpointing=True, optimizer="paged_adamw_8bit")
    found = estimate(model, dt.LoRA(r=64, alpha=16), Shape(1, 512, 512), options, dtype=torch.bfloat16,
                     device=torch.device("cuda"), quantize="nf4")  # fmt: skip
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    assert found.base == pytest.approx(linear * 4.127 / 8 + 2 * (n - linear), rel=1e-3)
    r64 = 80 * 64 * (4 * 2 * 8192 + 3 * (8192 + 22016))
    assert found.adapter == 4 * r64 == pytest.approx(found.gradients, rel=0.02)  # at the peak one is not made yet
    assert found.optimizer == pytest.approx(2 * r64, rel=0.02)
    assert 40 * GB < found.total < 48 * GB
    single = linear * (0.5 - 0.127) / 8  # what the second quantisation of the scales is worth
    assert 2.9 * GB < single < 3.1 * GB
    assert 2 * n > 130 * GB  # the weights alone in 16 bits: three such cards


def test_files_of_a_lora_of_rank_8_on_7_billion_parameters() -> None:
    size = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    model = _llama(**size)
    n = sum(p.numel() for p in model.parameters())
    assert n == 6_738_415_616
    attention = dt.plan(model, dt.LoRA(r=8, targets=dt.Part("q", "v"))).trained
    assert attention == 32 * 2 * 8 * (4096 + 4096) == 4_194_304 and 2 * attention == 8_388_608  # 8 MiB in 16 bits
    every = dt.plan(model, dt.LoRA(r=8)).trained
    assert every == 32 * 8 * (4 * 8192 + 3 * (4096 + 11008)) == 19_988_480
    assert 2 * n / (2 * attention) > 1600  # times smaller than the model it changes


def test_a_saved_file_is_as_large_as_its_parameters(recipe: dict[str, Any], tmp_path: Path) -> None:
    net = load_base(recipe["base"], dtype="float32", quantize="nf4")
    plan = dt.plan(net, dt.LoRA(r=8))
    file = dt.attach(net, dt.LoRA(r=8)).save(tmp_path / "a") / "adapter_model.safetensors"
    assert sum(t.numel() for t in load_file(file).values()) == plan.trained
    assert 0 <= file.stat().st_size - 4 * plan.trained < 6000  # and the header with the names
