"""From a recipe to a saved adapter; and `train`, the same for a model and an adapter that are there already."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import deltatune.interop  # noqa: F401  has adapters written in PEFT's layout
from deltatune.core import (
    Adapter,
    Callback,
    DeltatuneError,
    Method,
    Part,
    Plan,
    Union,
    attach,
    flatten,
    nearest,
    plan,
    resolve,
)
from deltatune.core.adapter import CONFIG, write_atomically
from deltatune.data import (
    Dataset,
    Encoded,
    Rows,
    Summary,
    load,
    normalise,
    templates,
)
from deltatune.data.encode import Task
from deltatune.data.formats import Labelled, Tagged
from deltatune.data.templates import NAMED, adds_bos
from deltatune.methods.tune import Beside, Tune
from deltatune.models.blocks import may_block
from deltatune.models.loading import FRESH, TASKS, load_base, load_tokenizer, locate, read_config
from deltatune.models.quantise import require
from deltatune.train import memory
from deltatune.train.batching import Packing, batches, largest, packs, prompted, wanted
from deltatune.train.loop import Result, fit
from deltatune.train.memory import Estimate
from deltatune.train.merged import TASKS as PEFT_TASKS
from deltatune.train.metrics import Report
from deltatune.train.options import TOKENS_PER_STEP, TrainOptions
from deltatune.train.process import Processes
from deltatune.train.recipe import Data, Recipe
from deltatune.train.rows import encode, held, started_from
from deltatune.train.training_data import begin

ADAPTER, MODEL, RECIPE = "adapter", "model", "recipe.yaml"
LEFT = {RECIPE, "metrics.jsonl", "loss.png", "tensorboard", "checkpoints"}  # by a run without a checkpoint
LONGEST = 1024
ON_CPU = 2048  # tokens: a larger micro-batch is no faster there, passes of 768 are a sixth slower


@dataclass(frozen=True)
class Outcome:
    """What a run did: `saved` is the folder of the adapter, or of the whole model; `peak` is measured, in bytes."""

    output: Path
    saved: Path
    result: Result
    summary: Summary
    plan: Plan | None
    packing: bool
    estimate: Estimate | None
    peak: int


@dataclass(frozen=True)
class Prepared:
    """A run before its weights are loaded."""

    recipe: Recipe
    base: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    task: Task
    method: Method | None
    rows: Encoded
    held_out: Encoded | None
    apart: Mapping[str, Encoded]  # what inits start from in place of `rows`, by name
    max_length: int
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...]

    def blank(self) -> Any:
        """The model, without its weights."""
        names = self.rows.label_names
        if names is not None:
            self.config.id2label = dict(enumerate(names))
        with torch.device("meta"):
            return getattr(transformers, TASKS[self.task]).from_config(self.config, dtype=self.dtype)

    def load(self) -> Any:
        """The base with its weights; a head that it does not have is drawn."""
        torch.manual_seed(self.recipe.seed)
        model = load_base(self.base, self.task, dtype=self.dtype, labels=self.rows.label_names,
                          quantize=self.recipe.quantize)  # fmt: skip
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def plan(self) -> Plan | None:
        return None if self.method is None else plan(self.blank(), self.method)

    def sized(
        self, process: int = 0, packing: Packing | None = None, processes: Processes | None = None
    ) -> tuple[TrainOptions, Estimate | DeltatuneError]:
        """The options with a micro-batch that fits into memory where the recipe leaves it open, and the estimate.

        packing: None where the base is not there to tell."""
        options = self.recipe.train
        how = self.likely() if packing is None else packing
        world = 1 if processes is None else processes.world
        choose = options.tokens_per_batch is None and options.batch_size is None
        step = (options.tokens_per_step or TOKENS_PER_STEP) // world
        longest = self.max_length if how != "none" else max(map(len, (*self.rows, *(self.held_out or ()))))
        if choose and self.device.type == "cpu" and step > ON_CPU:
            options = options.model_copy(update={"tokens_per_batch": max(ON_CPU, longest)})
        while True:
            shape = largest(
                batches(self.rows, self.tokenizer, options, self.task, how, self.max_length, self.recipe.seed)
            )
            try:
                found = memory.estimate(self.blank(), self.method, shape, options, dtype=self.dtype,
                                        device=self.device, process=process, quantize=self.recipe.quantize)  # fmt: skip
            except DeltatuneError as error:
                if how != "blocks":
                    return options, error
                how = "rows"  # the model asks of its attention what a layout of blocks cannot do
                continue
            size = options.tokens_per_batch or step
            if not choose or found.total <= memory.available(self.device) // 2 or size // 2 < longest:
                return options, found
            options = options.model_copy(update={"tokens_per_batch": size // 2})

    def likely(self) -> Packing:
        """How documents will share rows, as far as a model without weights can say; `packs` tries it on the base."""
        if not self.wants_packing():
            return "none"
        model = self.blank()
        if self.method is not None and prompted(attach(model, self.method)):
            return "none"
        blocks = self.recipe.train.batch_size is None and may_block(model, self.max_length)
        return "blocks" if blocks else "rows"

    def may_pack(self) -> bool:
        """Whether documents will share rows, by `likely`."""
        return self.likely() != "none"

    def wants_packing(self) -> bool:
        return wanted(self.recipe.data, self.recipe.train, self.task)


def prepare(recipe: Recipe, *, weights: bool = True) -> Prepared:
    """Reads tokenizer and data. Raises DeltatuneError for whatever is wrong with them, every bad row at once."""
    data, base = recipe.data, locate(recipe.base)
    if recipe.quantize is not None:
        require(recipe.quantize)
    config = read_config(base, weights=weights)
    tokenizer = load_tokenizer(base)
    source = load(data.train, format=data.format, columns=data.columns, split=data.split)
    task = recipe.task or _task(source, config)
    max_length, notes = _length(data.max_length, config, tokenizer)
    rows = encode(source, tokenizer, data, task, max_length)
    method = recipe.made_method()
    if method is not None and task in ("classification", "tagging"):
        method = _with_head(method, rows.label_names or ())
    kept, held_out = held(rows, data, tokenizer, task, max_length, recipe.seed)
    apart = started_from(method, rows, data, tokenizer, task, max_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if method is None else recipe.train.dtype(device)  # the optimizer's steps vanish in bf16
    return Prepared(recipe, base, config, tokenizer, task, method, kept, held_out, apart, max_length, dtype, device,
                    notes)  # fmt: skip


def run(recipe: Recipe, *, resume: bool = False, report: Report | None = None) -> Outcome:
    """Trains as `recipe` says, into its output folder: the adapter, the recipe in full, metrics, checkpoints.

    The adapter is saved without the networks that make prefixes and pseudo-tokens in training; checkpoints have them.

    report: called with the records of the loop, and with {"note": text}.
    Raises DeltatuneError for wrong input, before training; see `fit` for what can stop it later."""
    tell = (lambda text: report({"note": text})) if report is not None else (lambda text: None)
    output = Path(recipe.output).expanduser()
    _free(output, resume)
    ready = prepare(recipe)
    processes = Processes()
    for text in (str(ready.rows.summary), *ready.notes):
        tell(text)
    memory.warm(ready.dtype)
    process = memory.held() if processes.device.type == "cpu" else 0
    model = ready.load()
    torch.manual_seed(recipe.seed)
    method = None if ready.method is None else _with_fresh(ready.method, model)
    planned = ready.plan() if method is ready.method else plan(model, method)  # type: ignore[arg-type]
    adapter = None if method is None else attach(model, method)
    if adapter is None:
        model.requires_grad_(True)
    else:
        assert planned is not None
        tell(f"{len(planned.sites)} sites, {planned.trained:,} trained parameters "
             f"({100 * planned.trained / planned.total:.2f} % of {planned.total:,})")  # fmt: skip
    packing = packs(model, ready.wants_packing(), recipe.data.packing, recipe.train, ready.max_length)
    options, estimate = ready.sized(process, packing, processes)
    tell(str(estimate))
    if processes.main:
        output.mkdir(parents=True, exist_ok=True)
        recipe.model_copy(update={"train": options, "task": ready.task}).write(output / RECIPE)
    share = {"rank": processes.rank, "world": processes.world}
    how = (ready.tokenizer, options, ready.task, packing, ready.max_length, recipe.seed)
    made = batches(ready.rows, *how, **share)
    held_out = None if ready.held_out is None else batches(ready.held_out, *how, **share)
    if adapter is not None and not resume:
        begin(adapter, ready.apart, how, processes.device)
    memory.reset_peak(processes.device)
    result = fit(model, adapter, made, eval_batches=held_out, options=options, callbacks=recipe.made_callbacks(),
                 output=output, resume=resume, report=report)  # fmt: skip
    peak = memory.peak(processes.device)
    saved = output / (MODEL if adapter is None else ADAPTER)
    if processes.main:
        if adapter is not None:
            _lighten(adapter)
        _save(model, adapter, saved, ready)
    known = estimate if isinstance(estimate, Estimate) else None
    if known is not None:
        gap = known.total / peak - 1
        tell(f"memory: {peak / 2**30:.2f} GiB at most, {known.total / 2**30:.2f} GiB estimated ({gap:+.0%})")
    return Outcome(output, saved, result, ready.rows.summary, planned, packing != "none", known, peak)


def train(model: PreTrainedModel, adapter: Adapter | None, data: str | Path | Sequence[Mapping[str, Any]], *,
          tokenizer: PreTrainedTokenizerBase | None = None, task: Task | None = None, output: str | Path | None = None,
          callbacks: Sequence[Callback] = (), resume: bool = False, report: Report | None = None, **options: Any
          ) -> Result:  # fmt: skip
    """Trains `adapter` (None: the model's own parameters) on a file of rows, or a list of them.

    options: those of a recipe's `data` (eval, template, max_length, packing, …) and of `train` (epochs, lr, …).
    tokenizer: by default the one of the folder or hub name that `model` came from.
    Raises DeltatuneError for an unknown option, with the nearest name, and for all that `fit` raises."""
    unknown = [k for k in options if k not in Data.model_fields and k not in TrainOptions.model_fields]
    if unknown or "train" in options:
        known = [*(n for n in Data.model_fields if n != "train"), *TrainOptions.model_fields]
        name = unknown[0] if unknown else "train"
        raise DeltatuneError(f"train has no option {name!r}{nearest(name, known)}")
    mine = {k: v for k, v in options.items() if k in Data.model_fields}
    told = TrainOptions(**{k: v for k, v in options.items() if k not in mine})
    name = str(data) if isinstance(data, (str, Path)) else "rows"
    given = Recipe.of({"base": "", "data": {**mine, "train": name}}, "train").data
    tokenizer = tokenizer or load_tokenizer(str(model.name_or_path))
    how: dict[str, Any] = {"format": given.format, "columns": given.columns}
    if isinstance(data, (str, Path)):
        source = load(data, split=given.split, **how)
    else:
        source = normalise(Rows("rows", [dict(row) for row in data], [f"rows[{i}]" for i in range(len(data))]), **how)
    task = task or _task(source, model.config)
    max_length, _ = _length(given.max_length, model.config, tokenizer)
    names = adapter.labels if adapter is not None and task in ("classification", "tagging") else ()
    encoded = encode(source, tokenizer, given, task, max_length, names or None)
    rows, other = held(encoded, given, tokenizer, task, max_length, told.seed)
    packing = packs(model, wanted(given, told, task), given.packing, told, max_length)
    processes = Processes()
    if told.tokens_per_batch is None and told.batch_size is None and processes.device.type == "cpu":
        size = max(
            min(ON_CPU, told.tokens_per_step or TOKENS_PER_STEP),
            max_length if packing != "none" else max(map(len, rows)),
        )
        told = told.model_copy(update={"tokens_per_batch": size})
    share = {"rank": processes.rank, "world": processes.world}
    settled = (tokenizer, told, task, packing, max_length, told.seed)
    made = batches(rows, *settled, **share)
    held_out = None if other is None else batches(other, *settled, **share)
    if adapter is not None and not resume:
        apart = started_from(adapter.method, encoded, given, tokenizer, task, max_length)
        begin(adapter, apart, settled, processes.device)
    return fit(model, adapter, made, eval_batches=held_out, options=told, callbacks=callbacks, output=output,
               resume=resume, report=report)  # fmt: skip


def _task(source: Dataset, config: Any) -> Task:
    kind = type(source.items[0])
    usual: dict[type, Task] = {Labelled: "classification", Tagged: "tagging"}
    return usual.get(kind, "seq2seq" if config.is_encoder_decoder else "causal")


def _length(asked: int | None, config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, tuple[str, ...]]:
    """(the longest row in tokens, notes)."""
    named = (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions"))
    room = min(n for n in (*named, tokenizer.model_max_length) if n is not None)
    if asked is None:
        return min(LONGEST, room), ()
    if asked > room and getattr(config, "rope_parameters", None) is None:
        raise DeltatuneError(
            f"data.max_length: {asked} is more than the {room} tokens that the base can read; lower it"
        )
    beyond = (f"data.max_length: {asked} is more than the {room} tokens that the base was made for",)
    return asked, beyond if asked > room else ()


def _with_head(method: Method, labels: Sequence[str]) -> Method:
    """With a head for these labels, which starts untrained."""
    members = list(method.methods) if isinstance(method, Union) else [method]
    head = next((m for m in members if _has_head(m)), None)
    if head is None:
        return Union(methods=(*members, Tune(targets=Part("head"), labels=tuple(labels))))
    made = tuple(replace(m, labels=tuple(labels)) if m is head else m for m in members)  # type: ignore[call-arg]
    return made[0] if len(made) == 1 else Union(methods=made)


def _has_head(method: Method) -> bool:
    return hasattr(method, "labels") and (not isinstance(method, Tune) or method.targets in (None, Part("head")))


def _with_fresh(method: Method, model: Any) -> Method:
    """With what else the base had no weights for, such as BERT's pooler under a language model: it is saved then."""
    parts = [part for part in method.parts() if isinstance(part, Tune)]
    tuned = {match.path for part in parts for match in resolve(model, part.targets, part.usual)}
    fresh = tuple(path for path in getattr(model, FRESH, ()) if path not in tuned)
    if not fresh:
        return method
    members = [_beside(fresh, m, model) for m in (method.methods if isinstance(method, Union) else (method,))]
    return Union(methods=(*members, Tune(targets=tuple(map(re.escape, fresh)))))


def _beside(whole: tuple[str, ...], method: Method, model: Any) -> Method:
    """`method`, without what is trained whole."""
    if all(match.path not in whole for match in resolve(model, method.select(model), method.usual)):
        return method
    return replace(method, targets=Beside(targets=method.targets, whole=whole))


def _free(output: Path, resume: bool) -> None:
    if resume and not (output / "checkpoints" / "last").is_file():
        raise DeltatuneError(f"resume: {output} holds no checkpoint; start the run without resume")
    if resume or not output.exists():
        return
    if not output.is_dir():
        raise DeltatuneError(f"output: {output} is a file; name a folder")
    if (output / "checkpoints" / "last").is_file() and not any((output / n).exists() for n in (ADAPTER, MODEL)):
        raise DeltatuneError(
            f"output: {output} holds a run that is not finished; go on with --resume, or name another output"
        )
    if found := sorted({p.name for p in output.iterdir()} - LEFT):
        raise DeltatuneError(
            f"output: {output} is not empty ({', '.join(found[:3])}); name another, as output=runs/other"
        )


def _lighten(adapter: Adapter) -> None:
    """Drop the networks that only training needs, but where that is another method: a next stage goes on from those."""
    with suppress(DeltatuneError):  # prompts of several tasks
        pairs = zip(adapter.method.parts(), adapter.method.flat().parts(), strict=True)
        if all(type(part) is type(flat) for part, flat in pairs):
            flatten(adapter)


def _save(model: Any, adapter: Adapter | None, folder: Path, ready: Prepared) -> None:
    """With tokenizer and template beside it, so that it answers as it was trained."""
    tokenizer, base = ready.tokenizer, Path(ready.base)
    if adapter is None:
        model.save_pretrained(folder)
    else:
        adapter.save(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(base.resolve()) if base.is_dir() else ready.base
        config["task_type"] = next(name for name, task in PEFT_TASKS.items() if task == ready.task)
        if ready.recipe.quantize is not None:
            config["deltatune"]["quantize"] = ready.recipe.quantize
        write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    if ready.rows.summary.template is not None:
        used = templates.resolve(ready.recipe.data.template, tokenizer)
        named = used.name in NAMED and not adds_bos(tokenizer)
        tokenizer.chat_template = used.source.replace("{{ bos_token }}", "") if named else used.source
    tokenizer.save_pretrained(folder)
