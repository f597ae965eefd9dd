"""Inits that start from data of their own, and not from those that are trained on."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_data_inits import docs
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

import deltatune as dt
from deltatune.data import Batches
from deltatune.models.loading import load_base
from deltatune.models.tiny import tiny
from deltatune.train import Recipe, run
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions
from deltatune.train.run import prepare

GENERAL = [{"prompt": f"Who wrote book {i}?", "completion": f"Author {i} did."} for i in range(8)]
TASK = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]


@pytest.fixture
def files(tmp_path: Any) -> dict[str, str]:
    """A base, and rows to train on and to start from."""
    torch.manual_seed(0)
    tiny("llama", vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for name, rows in (("general", GENERAL), ("task", TASK)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / name) for name in ("base", "general.jsonl", "task.jsonl", "run")}


def train(files: dict[str, str], method: dt.core.Method, by_hand: Any = None, **options: Any) -> dt.Adapter:
    net = load_base(files["base"], dtype=torch.float32)
    torch.manual_seed(0)
    adapter = dt.attach(net, method)
    if by_hand is not None:
        dt.initialise(adapter, lambda n: (net(**batch).loss for batch in islice(by_hand, n)))
    dt.train(
        net, adapter, files["task.jsonl"], **{"max_steps": 1, "batch_size": 3, "lr": 1e-3, "max_length": 40} | options
    )
    return adapter


def starts(adapter: dt.Adapter) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in adapter.state_dict().items() if k.endswith("0")}


@pytest.mark.parametrize("init", [dt.CorDAPreserved, dt.CorDA, dt.LoRAGA])
def test_an_init_starts_from_the_data_that_it_names(files: dict[str, str], init: Any, monkeypatch: Any) -> None:
    """As it does where these are the training data."""
    general, task = files["general.jsonl"], files["task.jsonl"]
    found = starts(train(files, dt.LoRA(r=4, init=init(data=general))))
    other = starts(train(files, dt.LoRA(r=4, init=init(data=task))))
    monkeypatch.setattr(init, "apart", False)
    want = starts(train(files | {"task.jsonl": general}, dt.LoRA(r=4, init=init())))
    assert len(found) == 2 * 2 * 7 and found.keys() == want.keys()
    products = [{k: t @ of[f"{k[:-2]}a0"] for k, t in of.items() if k.endswith("b0")} for of in (found, want, other)]
    for k, product in products[0].items():
        torch.testing.assert_close(product, products[1][k], atol=1e-4, rtol=1e-3)
    assert max((product - products[2][k]).abs().max() for k, product in products[0].items()) > 1e-2


def test_a_recipe_names_the_data_of_an_init(files: dict[str, str]) -> None:
    method = {"name": "lora", "r": 4, "init": {"name": "corda_preserved", "data": files["general.jsonl"]}}
    options = {"max_steps": 1, "batch_size": 3, "lr": 1e-3}
    recipe = Recipe.of({"base": files["base"], "output": files["run"], "method": method, "train": options,
                        "data": {"train": files["task.jsonl"], "max_length": 40}})  # fmt: skip
    saved = load_file(run(recipe).saved / "adapter_model.safetensors")
    want = starts(train(files, recipe.made_method()))  # type: ignore[arg-type]
    for k in [k for k in want if k.endswith("b0")]:  # W' = W + [B - B0, B0] [A; A - A0]
        path = k.removesuffix(".0.b0")
        torch.testing.assert_close(saved[f"base_model.model.{path}.lora_B.weight"][:, 4:], want[k])
    assert Recipe.read(f"{files['run']}/recipe.yaml").made_method() == recipe.made_method()


def test_training_data_in_place_of_other_data_are_refused(files: dict[str, str], tmp_path: Any) -> None:
    with pytest.raises(dt.DeltatuneError, match="CorDAPreserved starts from other data than .* by its option `data`"):
        train(files, dt.LoRA(r=4, init=dt.CorDAPreserved()))
    method = dt.LoRA(r=4, init=dt.CorDAPreserved(data=str(tmp_path / "gone.jsonl")))
    with pytest.raises(dt.DeltatuneError, match="gone.jsonl"):
        train(files, method)
    with pytest.raises(dt.DeltatuneError, match="this training loop does not offer"):
        net = tiny("llama")
        fit(net, dt.attach(net, method), Batches(docs(), batch_size=4), options=TrainOptions(max_steps=1, batch_size=4))
    recipe = {"base": files["base"], "data": files["task.jsonl"], "method": {"name": "lora", "init": {
        "name": "corda_preserved", "data": "gone.jsonl"}}}  # fmt: skip
    with pytest.raises(dt.DeltatuneError, match="gone.jsonl"):
        prepare(Recipe.of(recipe))  # before the weights are loaded


def test_what_was_started_by_hand_is_not_started_again(files: dict[str, str]) -> None:
    method = dt.LoRA(r=4, init=dt.CorDA(data=files["general.jsonl"]))
    ids = torch.arange(3, 40).reshape(1, -1)
    batch = {"input_ids": ids, "labels": ids}
    found, want = (starts(train(files, m, by_hand=[batch])) for m in (method, dt.LoRA(r=4, init=dt.CorDA())))
    assert all(torch.equal(found[k], want[k]) for k in want)
