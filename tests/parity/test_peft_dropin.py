"""The classic tutorial, run twice: with `peft` imported and with the drop-in. Only the import line differs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from deltatune.models.tiny import tiny

TUTORIAL = """
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, pipeline
)
from {package} import (
    LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
)

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
rows = [
    {{"instruction": "What is the capital of Norway?", "input": "", "output": "The capital of Norway is Oslo."}},
    {{"instruction": "Say hello.", "input": "to you", "output": "Hello, how are you today?"}},
    {{"instruction": "What jumps?", "input": "", "output": "The quick brown fox jumps over the lazy dog."}},
    {{"instruction": "What shines?", "input": "", "output": "the lamp shines all night long."}},
] * 2

def process(example):
    prompt = "Human: " + "\\n".join([example["instruction"], example["input"]]).strip() + "\\n\\nAssistant: "
    asked, answer = tokenizer(prompt), tokenizer(example["output"] + tokenizer.eos_token)
    return {{
        "input_ids": (asked["input_ids"] + answer["input_ids"])[:64],
        "attention_mask": (asked["attention_mask"] + answer["attention_mask"])[:64],
        "labels": ([-100] * len(asked["input_ids"]) + answer["input_ids"])[:64],
    }}

data = Dataset.from_list(rows)
data = data.map(process, remove_columns=data.column_names)

config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=16, target_modules=".*\\\\.1.*query_key_value",
                    modules_to_save=["word_embeddings_layernorm"])
model = get_peft_model(model, config)
model.enable_input_require_grads()
model.print_trainable_parameters()

draw = torch.Generator().manual_seed(0)  # the same start for every implementation
start = {{
    k: 0.1 * torch.randn(v.shape, generator=draw) if "lora_" in k else v
    for k, v in sorted(get_peft_model_state_dict(model).items())
}}
set_peft_model_state_dict(model, start)

def arguments(**more):
    return TrainingArguments(
        output_dir=out, per_device_train_batch_size=2, gradient_accumulation_steps=1, logging_steps=1, save_steps=4,
        num_train_epochs=2, learning_rate=0.05, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, **more,
    )

def trained(model, **more):
    trainer = Trainer(
        model=model, args=arguments(gradient_checkpointing=True), train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
    )
    trainer.train(**more)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]

losses = trained(model)

ids = tokenizer("Human: What is the capital of Norway?\\n\\nAssistant: ", return_tensors="pt")
def answer(model):
    model.eval()
    return tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])

def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**ids).logits

text, at_end = answer(model), logits(model)
with model.disable_adapter():
    before = logits(model)
piped = pipeline("text-generation", model=model, tokenizer=tokenizer)(
    "Human: What is the capital of Norway?\\n\\nAssistant: ", max_new_tokens=12, do_sample=False
)[0]["generated_text"]

again = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{{
    "task_type": TaskType.CAUSAL_LM, "r": 4, "lora_alpha": 16, "target_modules": config.target_modules,
    "modules_to_save": ["word_embeddings_layernorm"]}}))
again.enable_input_require_grads()
resumed = trained(again, resume_from_checkpoint=out + "/checkpoint-4")
resumed_logits = logits(again)

loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out + "/checkpoint-8")
reloaded_text = answer(loaded)
merged = loaded.merge_and_unload()
merged_text, merged_logits = answer(merged), logits(merged)
merged.save_pretrained(out + "/merged")
final = AutoModelForCausalLM.from_pretrained(out + "/merged")
final_text, final_logits = answer(final), logits(final)
config_again = PeftConfig.from_pretrained(out + "/checkpoint-8")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    home = tmp_path_factory.mktemp("dropin")
    tokenizer = tiny_tokenizer(chat=False)
    torch.manual_seed(0)
    tiny("bloom", vocab_size=len(tokenizer)).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    found = {}
    for package in ("deltatune.interop.peft", "peft"):
        space: dict[str, object] = {"base": str(home / "base"), "out": str(home / package)}
        exec(compile(TUTORIAL.format(package=package), f"<tutorial with {package}>", "exec"), space)
        found[package] = SimpleNamespace(**space)
    return found


BOTH = pytest.mark.parametrize("package", ["deltatune.interop.peft", "peft"])


@BOTH
def test_trains_and_resumes(runs: dict[str, SimpleNamespace], package: str) -> None:
    run = runs[package]
    assert len(run.losses) == 8 and run.losses[-1] < run.losses[0] - 0.3
    assert run.losses[4:] == pytest.approx(run.resumed[-4:], abs=1e-4)
    torch.testing.assert_close(run.resumed_logits, run.at_end, rtol=1e-4, atol=1e-4)


@BOTH
def test_checkpoints_hold_the_adapter_alone(runs: dict[str, SimpleNamespace], package: str) -> None:
    folder = Path(runs[package].out) / "checkpoint-8"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [n for n in names if n.startswith(("model", "pytorch_model")) or n == "config.json"]
    base = Path(runs[package].base) / "model.safetensors"
    assert (folder / "adapter_model.safetensors").stat().st_size < base.stat().st_size / 4


@BOTH
def test_text_survives_saving_and_merging(runs: dict[str, SimpleNamespace], package: str) -> None:
    run = runs[package]
    assert run.text == run.reloaded_text == run.merged_text == run.final_text
    assert run.text.replace("<s>", "").startswith(run.piped[:40])
    torch.testing.assert_close(run.merged_logits, run.at_end, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.final_logits, run.merged_logits)
    assert (run.at_end - run.before).abs().max() > 0.1  # training did something
    assert run.config_again.r == 4 and run.config_again.inference_mode is True


def test_equal_numbers(runs: dict[str, SimpleNamespace]) -> None:
    ours, theirs = runs["deltatune.interop.peft"], runs["peft"]
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-4)
    torch.testing.assert_close(ours.before, theirs.before, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.at_end, theirs.at_end, rtol=2e-3, atol=2e-3)
    assert ours.text == theirs.text
    assert ours.config_again.to_dict().keys() == {k for k in theirs.config_again.to_dict() if k != "runtime_config"}


@pytest.mark.parametrize(("writer", "reader"), [("deltatune.interop.peft", "peft"), ("peft", "deltatune.interop.peft")])
def test_each_reads_the_others_checkpoint(runs: dict[str, SimpleNamespace], writer: str, reader: str) -> None:
    from transformers import AutoModelForCausalLM

    wrote, reads = runs[writer], runs[reader]
    model = AutoModelForCausalLM.from_pretrained(wrote.base)
    loaded = reads.PeftModel.from_pretrained(model, wrote.out + "/checkpoint-8")
    torch.testing.assert_close(reads.logits(loaded), wrote.at_end, rtol=1e-5, atol=1e-5)


def test_best_model_comes_back(tmp_path: Path) -> None:
    """The checkpoint of the first step, here the best by decree, is put back after training went on."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from deltatune.interop.peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=2))
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4)
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, eval_strategy="steps", eval_steps=1, save_steps=1, report_to=[],
        load_best_model_at_end=True, greater_is_better=True, metric_for_best_model="eval_loss", learning_rate=0.1,
        lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=options, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    seen = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert seen[-1] < max(seen) - 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(seen), abs=1e-5)


def test_copies_and_pickles() -> None:
    from deltatune.interop.peft import LoraConfig, PeftModel, get_peft_model
    from deltatune.models.tiny import inputs

    model = get_peft_model(tiny("gpt2"), LoraConfig(init_lora_weights=False))
    args = inputs(model)
    want = model(**args).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, PeftModel) and twin is not model
        assert torch.equal(twin(**args).logits, want)
        twin.unload()
        assert not torch.equal(twin(**args).logits, want)
    assert torch.equal(model(**args).logits, want)
