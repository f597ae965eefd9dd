"""The drop-in in use: other tasks and methods than the causal LoRA of the tutorial, and several adapters at once."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from deltatune.core import DeltatuneError
from deltatune.interop import peft as dropin
from deltatune.models.tiny import inputs, tiny

OPTIONS: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.05, "logging_steps": 1, "save_steps": 4,
    "max_steps": 8, "per_device_train_batch_size": 4, "seed": 0, "lr_scheduler_type": "constant",
}  # fmt: skip
CAUSAL = [{"input_ids": [5, 6, 7, 8 + i, 9, 2], "labels": [-100, -100, 7, 8 + i, 9, 2]} for i in range(4)]
SEQ2SEQ = [{"input_ids": [5, 6, 8 + i, 1], "labels": [8 + i, 7, 1]} for i in range(4)]
LABELLED = [{"input_ids": [5, 6, 8 + i, 2], "labels": i % 3} for i in range(4)]


@pytest.fixture(autouse=True)
def seeded() -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _out(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model), **more).logits


def _train(model: Any, rows: list[dict[str, Any]], out: Path, cls: Any = Trainer, callbacks: Any = None,
           resume: Any = None, **more: Any) -> list[float]:  # fmt: skip
    tokenizer = tiny_tokenizer()
    collate = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    arguments = Seq2SeqTrainingArguments if cls is Seq2SeqTrainer else TrainingArguments
    options = arguments(output_dir=str(out), **OPTIONS | more)
    if not isinstance(rows[0]["labels"], list):
        collate = None  # the default one stacks
    data = Dataset.from_list(rows)
    trainer = cls(model=model, args=options, train_dataset=data, data_collator=collate, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def _pair(base: Any, config: str, **options: Any) -> tuple[Any, Any]:
    """The base under our adapter, and a copy under PEFT's, both with PEFT's start."""
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, config)(**copy.deepcopy(options)))
    ours = dropin.get_peft_model(base, getattr(dropin, config)(**options))
    dropin.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return ours, theirs


def test_sequence_to_sequence(tmp_path: Path) -> None:
    ours, theirs = _pair(tiny("t5"), "LoraConfig", task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=32)
    losses = _train(ours, SEQ2SEQ, tmp_path / "ours", Seq2SeqTrainer)
    assert losses == pytest.approx(_train(theirs, SEQ2SEQ, tmp_path / "theirs", Seq2SeqTrainer), abs=1e-3)
    assert losses[-1] < losses[0] - 0.2
    assert isinstance(ours, dropin.PeftModelForSeq2SeqLM) and isinstance(ours, PreTrainedModel)
    ids = torch.tensor([[5, 6, 8, 1]])
    said = ours.eval().generate(input_ids=ids, max_new_tokens=5)
    assert torch.equal(said, theirs.eval().generate(input_ids=ids, max_new_tokens=5))
    assert torch.equal(said, ours.merge_and_unload().generate(input_ids=ids, max_new_tokens=5))


@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("gpt2", "SEQ_CLS"), ("roberta", "TOKEN_CLS")])
def test_heads_are_trained_and_saved(tmp_path: Path, family: str, task: str) -> None:
    base = tiny(family, "tokens" if task == "TOKEN_CLS" else "classification")
    untouched = copy.deepcopy(base)
    ours, theirs = _pair(base, "LoraConfig", task_type=task, r=4)
    rows = LABELLED if task == "SEQ_CLS" else [r | {"labels": [0, 1, 2, -100]} for r in LABELLED]
    losses = _train(ours, rows, tmp_path / "ours")
    assert losses == pytest.approx(_train(theirs, rows, tmp_path / "theirs"), abs=1e-3)
    head = "score" if family == "gpt2" else "classifier"
    saved = load_file(tmp_path / "ours/checkpoint-8/adapter_model.safetensors")
    reference = load_file(tmp_path / "theirs/checkpoint-8/adapter_model.safetensors")
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in reference.items()}
    start = untouched.get_submodule(head).state_dict()
    moved = [k for k, v in start.items() if not torch.equal(saved[f"base_model.model.{head}.{k}"], v)]
    assert moved == list(start)
    assert torch.equal(base.get_submodule(head).weight, start["weight"])  # that of the base is as it was
    again = dropin.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "ours/checkpoint-8")
    assert torch.equal(_out(again), _out(ours))
    there = peft.PeftModel.from_pretrained(untouched, tmp_path / "ours/checkpoint-8")
    torch.testing.assert_close(_out(there.get_base_model()), _out(ours), rtol=1e-5, atol=1e-5)


class Allocate(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3": ("llama", "IA3Config", {}),
    "ia3 on bloom": ("bloom", "IA3Config", {}),
    "dora": ("llama", "LoraConfig", {"use_dora": True}),
    "pissa": ("llama", "LoraConfig", {"init_lora_weights": "pissa", "r": 4}),
    "biases": ("gpt2", "LoraConfig", {"bias": "all", "modules_to_save": ["ln_f"]}),
    "biases of targets": ("bloom", "LoraConfig", {"bias": "lora_only"}),
    "adalora": ("llama", "AdaLoraConfig", {"total_step": 8, "tinit": 1, "tfinal": 2, "init_r": 4, "target_r": 2}),
    "prompt": ("llama", "PromptTuningConfig", {"num_virtual_tokens": 4}),
    "words": ("bloom", "PromptTuningConfig", {"num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prefix": ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prefix of zeros": ("gpt2", "PrefixTuningConfig", {"num_virtual_tokens": 4, "init_weights": "zero"}),
    "prefix projection": ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True}),
}


@pytest.mark.parametrize("case", METHODS)
def test_trains_saves_and_loads(tmp_path: Path, case: str) -> None:
    family, name, options = METHODS[case]
    base = tiny(family)
    untouched = copy.deepcopy(base)
    model = dropin.get_peft_model(base, getattr(dropin, name)(task_type="CAUSAL_LM", **options))
    losses = _train(model, CAUSAL, tmp_path, callbacks=[Allocate()] if name == "AdaLoraConfig" else None)
    assert losses[-1] < losses[0] - 0.05
    names = {p.name for p in (tmp_path / "checkpoint-8").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    again = dropin.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "checkpoint-8")
    assert type(again.active_peft_config).__name__ == name and not again.training
    torch.testing.assert_close(_out(again), _out(model), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in again.parameters())
    with model.disable_adapter():
        assert torch.equal(_out(model), _out(untouched))
    assert (_out(model) - _out(untouched)).abs().max() > 1e-2
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(ids, max_new_tokens=4), again.generate(ids, max_new_tokens=4))
    bare = model.unload()
    assert not isinstance(bare, dropin.PeftModel) and torch.equal(_out(bare), _out(untouched))


@pytest.mark.parametrize("case", ["ia3", "dora", "pissa", "adalora", "prompt", "prefix", "biases"])
def test_resumes(tmp_path: Path, case: str) -> None:
    family, name, options = METHODS[case]
    base = tiny(family)
    config = getattr(dropin, name)
    models = [dropin.get_peft_model(copy.deepcopy(base), config(**copy.deepcopy(options))) for _ in range(2)]
    losses = _train(models[0], CAUSAL, tmp_path)
    resumed = _train(models[1], CAUSAL, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert resumed[-4:] == pytest.approx(losses[-4:], abs=1e-4)


def test_adalora_penalises_and_prunes_as_peft_does() -> None:
    options = {"total_step": 10, "tinit": 1, "tfinal": 3, "init_r": 4, "target_r": 2, "task_type": "CAUSAL_LM"}
    models = _pair(tiny("llama"), "AdaLoraConfig", **options)
    seen = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for step in range(1, 10):
            batch = {k: torch.tensor([r[k] for r in CAUSAL]) for k in ("input_ids", "labels")}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        seen.append(losses)
    assert seen[0] == pytest.approx(seen[1], abs=2e-3)
    ranks = [
        sum(int((t != 0).sum()) for k, t in package.get_peft_model_state_dict(model).items() if "lora_E" in k)
        for package, model in zip((dropin, peft), models, strict=True)
    ]
    assert ranks[0] == ranks[1] == 8  # two of four triplets at each of four modules


@pytest.mark.parametrize("case", ["ia3", "dora", "pissa", "adalora", "biases", "biases of targets", "prefix"])
def test_peft_reads_what_was_trained(tmp_path: Path, case: str) -> None:
    family, name, options = METHODS[case]
    base = tiny(family)
    untouched = copy.deepcopy(base)
    model = dropin.get_peft_model(base, getattr(dropin, name)(task_type="CAUSAL_LM", **options))
    _train(model, CAUSAL, tmp_path, callbacks=[Allocate()] if name == "AdaLoraConfig" else None)
    there = peft.PeftModel.from_pretrained(untouched, tmp_path / "checkpoint-8")
    there = there if name == "PrefixTuningConfig" else there.get_base_model()
    torch.testing.assert_close(_out(there), _out(model), rtol=1e-4, atol=1e-4)


def test_peft_does_not_take_for_its_own_what_it_cannot_read(tmp_path: Path) -> None:
    """A prefix beside learned positions, which PEFT would shift: our layout, refused by PEFT instead of half loaded."""
    model = dropin.get_peft_model(tiny("gpt2"), dropin.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with pytest.raises((TypeError, KeyError), match="peft_type"):
        peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    config = dropin.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, dropin.PrefixTuningConfig) and config.num_virtual_tokens == 3
    with pytest.raises(DeltatuneError, match="cannot be expressed"):
        dropin.get_peft_model_state_dict(model)


def test_a_prompt_needs_a_length() -> None:
    with pytest.raises(DeltatuneError, match="num_virtual_tokens"):
        dropin.get_peft_model(tiny("llama"), dropin.PromptTuningConfig())


def test_prompt_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    base = tiny("bloom", vocab_size=len(tokenizer))
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "The capital of Norway", "tokenizer_name_or_path": str(tmp_path),
    }  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig(**options))
    ours = dropin.get_peft_model(base, dropin.PromptTuningConfig(**options))
    want = peft.get_peft_model_state_dict(theirs)["prompt_embeddings"]
    (prompt,) = (p for p in ours.parameters() if p.requires_grad)
    torch.testing.assert_close(prompt.detach(), want)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [("PromptTuningConfig", {}), ("PrefixTuningConfig", {}), ("PrefixTuningConfig", {"init_weights": "zero"})],
)
def test_random_prompts_have_the_spread_of_pefts(name: str, options: dict[str, Any]) -> None:
    spread = []
    for package in (dropin, peft):
        config = getattr(package, name)(task_type="CAUSAL_LM", num_virtual_tokens=100, **options)
        model = package.get_peft_model(tiny("llama"), config)
        drawn = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        spread.append(drawn.std().item())
    assert spread[0] == pytest.approx(spread[1], rel=0.05, abs=1e-9)


def test_pipeline(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = dropin.get_peft_model(tiny("bloom", vocab_size=len(tokenizer)), dropin.LoraConfig(init_lora_weights=False))
    asked = "Human: Hello\n\nAssistant: "
    say = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = say(asked, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    ids = model.generate(**tokenizer(asked, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)


def _trained(model: Any) -> set[str]:
    """Names of the adapters that have parameters to train."""
    named = list(model.named_parameters())
    return {n for n in model.peft_config if all(p.requires_grad for k, p in named if f"units.{n}." in k)}


def test_several_adapters(tmp_path: Path) -> None:
    base = tiny("llama")
    config = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    before = _out(base)
    model = dropin.get_peft_model(base, dropin.LoraConfig(**config))
    assert isinstance(model, dropin.PeftModelForCausalLM) and model is base
    model.add_adapter("law", dropin.LoraConfig(r=2, **config))
    assert model.active_adapters == ["default"] and _trained(model) == {"default"}
    mine = _out(model)
    model.set_adapter("law")
    assert model.active_adapter == "law" and _trained(model) == {"law"}
    law = _out(model)
    assert (law - mine).abs().max() > 1e-3 < (law - before).abs().max()
    with model.disable_adapter():
        assert torch.equal(_out(model), before)
    assert model.active_adapter == "law"
    mixed = _out(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], mine[0])
    torch.testing.assert_close(mixed[1], before[1])
    ids = inputs(model)
    rows = model.generate(**ids, adapter_names=["law", "default"], max_new_tokens=4, do_sample=False)
    for i, name in enumerate(["law", "default"]):
        model.set_adapter(name)
        assert torch.equal(rows[i], model.generate(**ids, max_new_tokens=4, do_sample=False)[i])
    model.base_model.set_adapter(["default", "law"])
    both = _out(model)
    model.merge_adapter()
    torch.testing.assert_close(_out(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(_out(model), both)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "law/adapter_config.json").is_file()
    model.delete_adapter("default")
    assert model.active_adapters == ["law"] and torch.equal(_out(model), law)
    with pytest.raises(DeltatuneError, match="default"):
        model.set_adapter("default")
    model.load_adapter(tmp_path, "default")
    assert model.active_adapters == ["law"] and _trained(model) == {"law"} and not model.training
    model.set_adapter("default")
    torch.testing.assert_close(_out(model), mine)
    again = dropin.PeftModel.from_pretrained(tiny("llama"), tmp_path / "law", "law", is_trainable=True)
    assert _trained(again) == {"law"} and again.peft_config["law"].r == 2
    for name in ("default", "law"):
        model.delete_adapter(name)
    assert model.active_adapters == [] and torch.equal(_out(model), before)
    bare = model.unload()
    assert torch.equal(_out(bare), before) and type(bare).__name__ == "LlamaForCausalLM" and bare is base
    assert all(p.requires_grad for p in bare.parameters())


def test_views() -> None:
    model = dropin.get_peft_model(tiny("llama"), dropin.LoraConfig())
    assert model.base_model.model is model is model.get_base_model()
    assert model.base_model.embed_tokens is model.model.embed_tokens
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig())
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for family in ("t5", "bart", "bert"):
        task = {"task_type": "FEATURE_EXTRACTION"}
        model = dropin.get_peft_model(tiny(family), dropin.LoraConfig(**task))
        plain = tiny(family)
        for ask in ("get_encoder", "get_decoder", "get_input_embeddings"):
            if hasattr(plain, ask):
                assert type(getattr(model, ask)()) is type(getattr(plain, ask)()), (family, ask)


def test_prints_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for package in (dropin, peft):
        package.get_peft_model(tiny("llama"), package.LoraConfig(r=4)).print_trainable_parameters()
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and lines[0].startswith("trainable params: 896 || all params:")


def test_constructor_and_second_call() -> None:
    base = tiny("gpt2")
    model = dropin.PeftModelForCausalLM(base, dropin.LoraConfig(task_type="CAUSAL_LM"))
    assert model is base and isinstance(model, dropin.PeftModelForCausalLM)
    with pytest.warns(UserWarning, match="replaced"):
        again = dropin.get_peft_model(model, dropin.LoraConfig(r=3))
    assert again is model and list(model.peft_config) == ["default"] and model.active_peft_config.r == 3


def test_loads_the_base_by_itself(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = dropin.get_peft_model(base, dropin.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "law")
    again = dropin.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "law")
    assert torch.equal(_out(again), _out(model))
    assert torch.equal(_out(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "law")), _out(again))


def test_half_precision_bases() -> None:
    model = dropin.get_peft_model(tiny("llama").to(torch.bfloat16), dropin.LoraConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    as_base = dropin.get_peft_model(tiny("llama").to(torch.bfloat16), dropin.LoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in as_base.parameters() if p.requires_grad} == {torch.bfloat16}
    ready = dropin.prepare_model_for_kbit_training(tiny("llama").to(torch.bfloat16))
    assert {(p.dtype, p.requires_grad) for p in ready.parameters()} == {(torch.float32, False)}


def test_damaged_files_leave_the_model_alone(tmp_path: Path) -> None:
    model = dropin.get_peft_model(tiny("llama"), dropin.LoraConfig())
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    base = tiny("llama")
    with pytest.raises(DeltatuneError, match="adapter_model"):
        dropin.PeftModel.from_pretrained(base, tmp_path)
    assert type(base).__mro__[0].__name__ == "LlamaForCausalLM" and not isinstance(base, dropin.PeftModel)
    assert all(p.requires_grad for p in base.parameters())
