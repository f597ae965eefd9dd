"""Merge adapters into their base, prove that the result is the same model, and write it as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import deltatune.interop  # noqa: F401  teaches `load` PEFT's format
from deltatune.core import DeltatuneError, activate, load, merge
from deltatune.data.templates import resolve
from deltatune.models.loading import load_base, load_tokenizer, read_config, to_dtype
from deltatune.models.quantise import dequantise

PROMPTS = (
    "What is the capital of Norway?",
    "Write one sentence about the sea.",
    "Translate to German: Good morning, how are you?",
    "2, 4, 6, 8,",
)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # what rounding the weights costs
TASKS = {"SEQ_CLS": "classification", "TOKEN_CLS": "tagging", "SEQ_2_SEQ_LM": "seq2seq", "CAUSAL_LM": "causal"}


@dataclass(frozen=True)
class Difference:
    """How far a model's logits, in fp32, lie from those under the adapter, over the prompts and the adapter's answers.

    `absolute` is the largest difference, `relative` the largest of a prompt over that prompt's largest logit; `texts`
    of `prompts` greedy answers are equal, token for token.
    """

    absolute: float
    relative: float
    texts: int
    prompts: int

    def __str__(self) -> str:
        gap = f"largest logit difference {self.absolute:.2e} ({self.relative:.2e} relative)"
        return f"{gap}, {self.texts} of {self.prompts} answers equal"


@dataclass(frozen=True)
class Merged:
    """`merged`: the merged weights in fp32; `written`: those in `folder`, rounded to its precision and read back."""

    folder: Path
    merged: Difference
    written: Difference


@dataclass(frozen=True)
class Answer:
    prompt: Tensor  # (1, prompt)
    tokens: Tensor  # (1, new), empty for a classifier
    logits: Tensor  # (1, positions, vocabulary), or (1, labels)


def write_merged(base: str | Path, adapters: Sequence[str | Path], output: str | Path, *,
                 prompts: Sequence[str] = PROMPTS, tolerance: float | None = None,
                 dtype: str | torch.dtype = "auto") -> Merged:  # fmt: skip
    """Merge the saved `adapters`, in order, into `base`; write model, tokenizer, template and stop tokens to `output`.

    A base that was quantised in training is the one that its codes stand for, so the model is the one that was trained.
    dtype: the precision to write; by default the base's own. tolerance: the largest relative difference allowed, by
    default 1e-3 in fp32 and `TOLERANCE` of what is written.
    Raises DeltatuneError, and leaves nothing behind, when `output` holds something, an adapter cannot be merged, or
    the merged or the written model differs from the adapter by more than the tolerance.
    """
    out = Path(output).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DeltatuneError(f"output: {out} exists and is not an empty folder; name another")
    if not prompts:
        raise DeltatuneError("merging needs at least one prompt to compare on")
    task = _task(adapters)
    stored: Any = to_dtype(dtype) or read_config(base).dtype or torch.float32
    tokenizer = load_tokenizer(base, adapters)
    quantize = quantised(adapters)
    model = load_base(base, task, dtype=torch.float32, quantize=quantize)
    if quantize is not None:
        dequantise(model, torch.float32)
    names = [load(model, folder, f"merged-{i}").name for i, folder in enumerate(adapters)]
    activate(model, *names)
    expected = [_answer(model, tokenizer, prompt) for prompt in prompts]
    try:
        merge(model, *names, keep=False)
    except DeltatuneError as error:
        raise DeltatuneError(
            f"{error}; keep it as an adapter: chat, generate and dt.load run it beside its base without merging"
        ) from error
    merged = _compare(model, tokenizer, expected)
    _refuse_above(TOLERANCE[torch.float32] if tolerance is None else tolerance, merged, "the merged model")
    _tell_untied(model)
    if model.can_generate():
        model.generation_config.eos_token_id = stop_tokens(model, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.to(stored).save_pretrained(scratch)  # type: ignore[arg-type]
        tokenizer.save_pretrained(scratch)
        del model  # so that one copy is in memory, not two
        written = _compare(load_base(scratch, task, dtype=torch.float32), tokenizer, expected)
        allowed = TOLERANCE.get(stored, 1e-3) if tolerance is None else tolerance
        _refuse_above(allowed, written, f"the model as written in {str(stored).removeprefix('torch.')}")
        _publish(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Merged(out, merged, written)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where answers end: the model's own end tokens, and the tokenizer's, which training ended turns with."""
    own = model.generation_config.eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def quantised(adapters: Sequence[str | Path]) -> str | None:
    """How the base was stored that the saved `adapters` were trained on; raises when they do not agree."""
    found = {str(folder): _config(folder).get("deltatune", {}).get("quantize") for folder in adapters}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{folder}: {kind or 'not quantised'}" for folder, kind in found.items())
        raise DeltatuneError(f"adapter: these were trained on bases stored differently ({told}); use them apart")
    return next(iter(found.values()), None)


def _config(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise DeltatuneError(f"adapter: {folder}: no adapter_config.json there, so this is not a saved adapter")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _task(adapters: Sequence[str | Path]) -> str | None:
    return next((TASKS[kind] for folder in adapters if (kind := _config(folder).get("task_type")) in TASKS), None)


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Answer:
    generates = model.can_generate()
    text = resolve(None, tokenizer).render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    tokens = _greedy(model, tokenizer, ids) if generates else ids.new_empty(1, 0)
    return Answer(ids, tokens, _logits(model, ids, tokens))


@torch.no_grad()
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, new: int = 16) -> Tensor:
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": new}
    options["pad_token_id"] = tokenizer.pad_token_id
    done = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return done if model.config.is_encoder_decoder else done[:, ids.shape[1] :]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, tokens: Tensor) -> Tensor:
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=tokens).logits.float()
    return model(input_ids=torch.cat([ids, tokens], 1)).logits.float()


def _compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, expected: Sequence[Answer]) -> Difference:
    absolute = relative = 0.0
    texts = 0
    for answer in expected:
        gap = float((_logits(model, answer.prompt, answer.tokens) - answer.logits).abs().max())
        absolute = max(absolute, gap) if gap == gap else float("nan")
        relative = max(relative, gap / float(answer.logits.abs().max())) if gap == gap else float("nan")
        texts += not model.can_generate() or torch.equal(_greedy(model, tokenizer, answer.prompt), answer.tokens)
    return Difference(absolute, relative, texts, len(expected))


def _refuse_above(tolerance: float, difference: Difference, what: str) -> None:
    if not difference.relative <= tolerance:  # nan as well
        raise DeltatuneError(
            f"{what} differs from the adapter: {difference}; more than the tolerance of {tolerance:g}. Nothing was"
            " written; write it in float32 (--dtype float32), or allow more (--tolerance)"
        )


def _tell_untied(model: PreTrainedModel) -> None:
    """Merging gives a shared embedding and head matrices of their own; loading would tie them again, but for this."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _publish(scratch: Path, out: Path) -> None:
    """All of the folder, synced, or nothing."""
    for path in scratch.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    scratch.chmod(0o755)
    try:
        scratch.rename(out)
    except OSError as error:
        raise DeltatuneError(f"output: {out} could not be written ({error.strerror})") from error
