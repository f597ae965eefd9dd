"""PEFT's model, as methods grafted onto the root of the model itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from deltatune import core
from deltatune.core import Adapter, DeltatuneError, Run
from deltatune.core import adapter as core_adapter
from deltatune.core import checkpoint as core_checkpoint
from deltatune.core.errors import nearest
from deltatune.core.slot import switch_of
from deltatune.interop.peft_config import AdaLoraConfig, PeftConfig, TaskType, folder_of
from deltatune.interop.peft_graft import BaseView, Rooted, graft, ungraft, ungrafted
from deltatune.interop.peft_method import method_of, start
from deltatune.interop.peft_state import encoded, fill
from deltatune.routers.per_row import PerRow

BASE = "__base__"
_AS_WRITTEN = (  # by the tensors
    "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "save_projection"
)  # fmt: skip


class PeftModel(Rooted):
    """What `get_peft_model` adds to a model. Calling the class does the same: `PeftModelForCausalLM(model, config)`."""

    peft_config: dict[str, PeftConfig]

    def __new__(cls, model: Any = None, peft_config: Any = None, adapter_name: str = "default", **kwargs: Any) -> Any:
        return object.__new__(cls) if model is None else get_peft_model(model, peft_config, adapter_name, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `__new__` gave back a model that is alive."""

    # which adapters are in effect, and which train

    @property
    def active_adapters(self) -> list[str]:
        return list(switch.current.names) if (switch := switch_of(self)) else []  # type: ignore[arg-type]

    @property
    def active_adapter(self) -> str:
        return (self.active_adapters or list(self.peft_config))[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Put these adapters in effect, and train them alone, unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        core.activate(self, *names)
        for name in self.peft_config:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for p in _adapter(self, name).parameters():
                p.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        names = self.active_adapters
        core.activate(self)
        try:
            yield
        finally:
            core.activate(self, *names)

    def _rows(self, adapter_names: Sequence[str] | None) -> Any:
        """Within: row i of the batch is under `adapter_names[i]`."""
        if adapter_names is None:
            return nullcontext()
        return core.using(self, router=PerRow([None if n == BASE else n for n in adapter_names]))

    def _run(self, forward: Callable[..., Any], *args: Any, adapter_names: Sequence[str] | None = None,
             **kwargs: Any) -> Any:  # fmt: skip
        """The base's `forward`, under the adapters in effect or those named for each row."""
        with self._rows(adapter_names):
            out = forward(*args, **kwargs)
        config = self.active_peft_config if self.active_adapters else None
        if isinstance(config, AdaLoraConfig) and getattr(out, "loss", None) is not None:
            run, events = _allocation(self)
            events.unpenalised = True  # PEFT adds the penalty to every loss
            out.loss = events.on_loss(run, out.loss)
        return out

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        with self._rows(adapter_names):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    # adding and removing

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **kwargs: Any) -> None:
        """Attach a new adapter, untrained, frozen and not in effect: `set_adapter` does the rest."""
        _attach(self, peft_config, adapter_name)

    def load_adapter(self, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
                     **kwargs: Any) -> _IncompatibleKeys:  # fmt: skip
        """Load a folder into the adapter of that name, or into a new one, which is not put in effect."""
        folder = folder_of(model_id, **kwargs)
        if adapter_name in self.peft_config:
            fill(_adapter(self, adapter_name), *core_checkpoint.read_folder(folder))
        else:
            config = PeftConfig.from_pretrained(folder)
            config.inference_mode = not is_trainable
            _attach(self, config, adapter_name, folder)
            self.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()  # type: ignore[attr-defined]
        return _IncompatibleKeys([], [])

    def delete_adapter(self, adapter_name: str) -> None:
        _adapter(self, adapter_name)
        was = self.active_adapters
        with ungrafted(self):
            core.detach(self, adapter_name)  # type: ignore[arg-type]
        del self.peft_config[adapter_name]
        if rest := [n for n in was if n != adapter_name] or list(self.peft_config)[:1]:
            self.set_adapter(rest)

    def unload(self) -> Any:
        """The base model, as it was before any adapter."""
        return _bare(self)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False,
                         adapter_names: Sequence[str] | None = None) -> Any:  # fmt: skip
        """The base model with the adapters in effect, or those named, in its weights. Refuses non-finite weights."""
        core.merge(self, *(adapter_names or self.active_adapters), keep=False)
        return _bare(self)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        core.merge(self, *(adapter_names or self.active_adapters))

    def unmerge_adapter(self) -> None:
        core.unmerge(self)

    # looking in

    @property
    def base_model(self) -> BaseView:
        return BaseView(self, super().base_model)  # type: ignore[misc]

    def get_base_model(self) -> Any:
        """This model: the adapters live in it."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all). Quantised weights count as the weights that they stand for."""
        count = [(_numel(p), p.requires_grad) for _, p in self.named_parameters()]
        return sum(n for n, trains in count if trains), sum(n for n, _ in count)

    def print_trainable_parameters(self) -> None:
        some, every = self.get_nb_trainable_parameters()
        print(f"trainable params: {some:,d} || all params: {every:,d} || trainable%: {100 * some / every:.4f}")

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA: drop triplets to the budget of step `global_step`, while the gradients are still there."""
        run, events = _allocation(self)
        run.step = global_step
        events.on_step_end(run)

    # files

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True,
                        selected_adapters: Sequence[str] | None = None, is_main_process: bool = True,
                        **kwargs: Any) -> None:  # fmt: skip
        """Write the adapters alone: "default" into the folder itself, any other into a folder of its name in it."""
        if not safe_serialization:
            warnings.warn("adapters are written as safetensors; safe_serialization=False is ignored", stacklevel=2)
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        for name in names if is_main_process else []:
            folder = _adapter(self, name).save(Path(save_directory) / ("" if name == "default" else name))
            path = folder / core_adapter.CONFIG
            written = json.loads(path.read_text())
            fields = self.peft_config[name].to_dict() | {"inference_mode": True}
            own = {k: v for k, v in fields.items() if k not in written or (v is not None and k not in _AS_WRITTEN)}
            if written["deltatune"]["tensors"] != "peft":  # PEFT must not take the file for one of its own
                own = {"deltatune": written["deltatune"] | {"peft": fields}}
            core_adapter.write_atomically(path, json.dumps(written | own, indent=2, sort_keys=True).encode())

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default",
                        is_trainable: bool = False, config: PeftConfig | None = None,
                        **kwargs: Any) -> Any:  # fmt: skip
        """Load a saved adapter onto `model`, in place; for inference, unless `is_trainable`.

        Raises DeltatuneError, and leaves the model as it was, when the files are missing or do not fit the model.
        """
        folder = folder_of(model_id, **kwargs)
        config = config or PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        if not isinstance(model, PeftModel):
            _graft(model, config, cls)
        try:
            _attach(model, config, adapter_name, folder)
        except Exception:
            if not model.peft_config:
                _bare(model)
            raise
        model.set_adapter(adapter_name, inference_mode=not is_trainable)  # type: ignore[operator]
        return model if is_trainable else model.eval()


class PeftModelForCausalLM(PeftModel):
    pass


class PeftModelForSeq2SeqLM(PeftModel):
    pass


class PeftModelForSequenceClassification(PeftModel):
    pass


class PeftModelForTokenClassification(PeftModel):
    pass


class PeftModelForQuestionAnswering(PeftModel):
    pass


class PeftModelForFeatureExtraction(PeftModel):
    pass


_KINDS = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", mixed: bool = False,
                   autocast_adapter_dtype: bool = True, revision: str | None = None,
                   low_cpu_mem_usage: bool = False) -> Any:  # fmt: skip
    """Freeze `model`, attach the adapter that `peft_config` describes, and give the model back as a `PeftModel`.

    A second call with the same name replaces that adapter, as a notebook's cell that runs again would expect.
    """
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    peft_config.revision = revision or peft_config.revision
    if not isinstance(model, PeftModel):
        _graft(model, peft_config)
    elif adapter_name in model.peft_config:
        warnings.warn(f"adapter {adapter_name!r} is replaced; .unload() first to start from the base", stacklevel=2)
        model.delete_adapter(adapter_name)
    dtype = None if autocast_adapter_dtype else getattr(model, "dtype", None)
    try:
        _attach(model, peft_config, adapter_name, dtype=dtype)
    except Exception:
        if not model.peft_config:
            _bare(model)
        raise
    model.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)  # type: ignore[operator]
    if getattr(model, "is_gradient_checkpointing", False):
        model.enable_input_require_grads()  # type: ignore[operator]
    return model


def get_peft_model_state_dict(model: Any, state_dict: Any = None, adapter_name: str = "default",
                              **kwargs: Any) -> dict[str, Tensor]:  # fmt: skip
    """The adapter's tensors under PEFT's names; `state_dict` is accepted and the live tensors are read."""
    return encoded(_adapter(model, adapter_name))


def set_peft_model_state_dict(model: Any, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default",
                              **kwargs: Any) -> _IncompatibleKeys:  # fmt: skip
    """Fill an adapter from tensors under PEFT's names. Raises DeltatuneError when they do not fit."""
    fill(_adapter(model, adapter_name), model.peft_config[adapter_name].to_dict(), peft_model_state_dict)
    return _IncompatibleKeys([], [])


def prepare_model_for_kbit_training(model: Any, use_gradient_checkpointing: bool = True,
                                    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
                                    **kwargs: Any) -> Any:  # fmt: skip
    """Freeze a model, cast its half-precision parameters to fp32, and checkpoint its activations if it is quantised."""
    quantised = getattr(model, "is_quantized", False)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dtype in (torch.float16, torch.bfloat16) and type(p) is torch.nn.Parameter:
            p.data = p.data.float()
    if quantised and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


class _Auto:
    auto: str

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default",
                        is_trainable: bool = False, **kwargs: Any) -> Any:  # fmt: skip
        """The base model that the adapter's folder names, with the adapter on it."""
        folder = folder_of(pretrained_model_name_or_path)
        config = PeftConfig.from_pretrained(folder)
        if config.base_model_name_or_path is None:
            raise DeltatuneError(f"{folder}: the configuration names no base model; load it yourself")
        base = getattr(transformers, cls.auto).from_pretrained(config.base_model_name_or_path, **kwargs)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, config)


class AutoPeftModelForCausalLM(_Auto):
    auto = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_Auto):
    auto = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_Auto):
    auto = "AutoModelForSequenceClassification"


def _graft(model: Any, config: PeftConfig, kind: type[PeftModel] = PeftModel) -> None:
    if kind is PeftModel and config.task_type is not None:
        kind = _KINDS[TaskType(config.task_type)]
    graft(model, kind)
    model.peft_config, model._allocations = {}, {}


def _bare(model: Any) -> Any:
    """The model without adapters, and of its own class again."""
    ungraft(model)
    if core.adapters(model):
        core.detach(model)
    del model.peft_config, model._allocations
    return model


def _attach(model: Any, config: PeftConfig, name: str, folder: Path | None = None, dtype: Any = None) -> None:
    """Attach an adapter, new or saved in `folder`, and leave those in effect as they were."""
    was = model.active_adapters if model.peft_config else []
    with ungrafted(model):
        if folder is None:
            adapter = core.attach(model, method_of(model, config), name, dtype=dtype)
            start(adapter, config)
        else:
            adapter = core.load(model, folder, name)
    core.activate(model, *was)
    for p in adapter.parameters():
        p.requires_grad_(False)
    model.peft_config[name] = config


def _allocation(model: Any) -> tuple[Run, Any]:
    """The run and the events of the active AdaLoRA adapter, begun when first asked for."""
    config = model.active_peft_config
    if not isinstance(config, AdaLoraConfig):
        kind = f"adapter {model.active_adapter!r} is {config.peft_type}"
        raise DeltatuneError(f"update_and_allocate: {kind}, not ADALORA")
    if model.active_adapter not in model._allocations:
        adapter = _adapter(model, model.active_adapter)
        run = Run(model, adapter, steps=config.total_step or 0)
        model._allocations[adapter.name] = run, next(iter(adapter.callbacks())).start(run)
    return model._allocations[model.active_adapter]


def _adapter(model: Any, name: str) -> Adapter:
    if name not in model.peft_config:
        known = ", ".join(model.peft_config)
        raise DeltatuneError(f"no adapter {name!r}{nearest(name, model.peft_config)}; there are {known}")
    return Adapter(model, name)


def _numel(p: Tensor) -> int:
    four_bit = type(p).__name__ == "Params4bit"  # two weights a byte
    return p.numel() * (2 * getattr(p, "quant_storage", torch.uint8).itemsize if four_bit else 1)
