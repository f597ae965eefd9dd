"""Methods of two stages, each a recipe: prompts of the sources, what they have in common, and a target from that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer

from deltatune.core import DeltatuneError
from deltatune.models.tiny import tiny
from deltatune.train import Recipe, run

TASKS = ("one", "two")


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Trains on rows of the tasks, named where there are several; the folder of the adapter."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def trained(name: str, tasks: tuple[str, ...], method: dict[str, Any], **more: Any) -> Path:
        rows = [{"prompt": f"{task} {i} ?", "completion": f"{task} is {i}"} for i in range(6) for task in tasks]
        if len(tasks) > 1:
            rows = [{**row, "adapter": f"default.{row['prompt'].split()[0]}"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {"base": str(tmp_path / "base"), "data": {"train": str(tmp_path / f"{name}.jsonl"), "eval": 2},
                  "method": method, "train": {"max_steps": 4, "batch_size": 4, "lr": 1e-2},
                  "output": str(tmp_path / name)} | more  # fmt: skip
        return run(Recipe.of(recipe)).saved

    return trained


@pytest.fixture
def prompts(train: Callable[..., Path]) -> dict[str, str]:
    return {task: str(train(task, (task,), {"name": "prompt_tuning", "length": 3})) for task in TASKS}


def tensors(adapter: Path | str, end: str) -> list[torch.Tensor]:
    found = load_file(Path(adapter) / "adapter_model.safetensors")
    return [t for name, t in found.items() if name.endswith(end)]


def test_a_prompt_for_several_tasks_is_distilled_from_their_prompts(train: Any, prompts: dict[str, str]) -> None:
    method = {"name": "multitask_prompt", "length": 3, "tasks": list(TASKS)}
    alone = train("alone", TASKS, method)
    taught = train("taught", TASKS, method, callbacks=[{"name": "distillation", "teachers": prompts}])
    (without,), (with_them,) = (tensors(folder, "shared") for folder in (alone, taught))
    assert without.shape == with_them.shape == (3, 32) and not torch.equal(without, with_them)
    names = load_file(taught / "adapter_model.safetensors")
    assert names.keys() == load_file(alone / "adapter_model.safetensors").keys()  # no teacher is saved
    begun = [{"name": "transfer", "source": str(taught)}]
    target = train("target", ("one",), {"name": "multitask_prompt", "length": 3}, callbacks=begun,
                   train={"max_steps": 1, "lr": 1e-6})  # fmt: skip
    torch.testing.assert_close(tensors(target, "shared")[0], with_them, rtol=0, atol=1e-5)


def test_a_subspace_of_tuned_prompts_and_a_prompt_in_it(train: Any, prompts: dict[str, str]) -> None:
    method = {"name": "intrinsic_subspace", "length": 3, "dim": 4, "tasks": list(TASKS)}
    callbacks = [{"name": "source_prompts", "prompts": prompts}]
    subspace = train("subspace", TASKS, method, callbacks=callbacks)
    want = torch.stack([load_file(Path(prompts[t]) / "adapter_model.safetensors")["prompt_embeddings"] for t in TASKS])
    (given,) = tensors(subspace, ".prompts")
    torch.testing.assert_close(given, want)
    target = train("target", ("one",), {"name": "intrinsic_prompt", "length": 3, "dim": 4},
                   callbacks=[{"name": "transfer", "source": str(subspace)}])  # fmt: skip
    for name in ("decoder.0.weight", "decoder.2.weight"):
        assert torch.equal(*(t for folder in (subspace, target) for t in tensors(folder, name)))
    with pytest.raises(DeltatuneError, match=r"no tuned prompts .* SourcePrompts"):
        train("none", TASKS, method)
    with pytest.raises(DeltatuneError, match=r"no prompt of task 'two'; the adapter's tasks are one, two"):
        train("few", TASKS, method, callbacks=[{"name": "source_prompts", "prompts": {"one": prompts["one"]}}])
    with pytest.raises(DeltatuneError, match=r"that of one is \(3, 32\); the adapter has length 5"):
        train("long", TASKS, {**method, "length": 5}, callbacks=callbacks)
