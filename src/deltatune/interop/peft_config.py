"""Configurations with the fields, defaults and files of PEFT 0.21: values to be translated, not methods."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from deltatune.core import DeltatuneError
from deltatune.core.adapter import CONFIG, write_atomically
from deltatune.core.errors import nearest

VERSION = "0.21.2"  # the release whose files these are


class TaskType(StrEnum):
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    VERA = "VERA"
    LOHA = "LOHA"
    LOKR = "LOKR"


class PromptTuningInit(StrEnum):
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PromptEncoderReparameterizationType(StrEnum):
    MLP = "MLP"
    LSTM = "LSTM"


Names = list[str] | set[str] | str | None


@dataclass
class PeftConfig:
    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self.peft_version = self.peft_version or VERSION
        if self.task_type is not None:
            self.task_type = _member(TaskType, "task_type", self.task_type)
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(v := getattr(self, name, None), (list, tuple)):
                setattr(self, name, set(v))

    @property
    def is_prompt_learning(self) -> bool:
        return isinstance(self, PromptLearningConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON: sets become sorted lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "runtime_config"}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, json.dumps(self.to_dict(), indent=2, sort_keys=True).encode())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None,
                        **kwargs: Any) -> PeftConfig:  # fmt: skip
        """The configuration saved in a folder, of the class that its `peft_type` names; unknown keys are dropped
        with a warning, as they come from other releases.

        Raises DeltatuneError when the file is missing, damaged, or of a method that is not offered here.
        """
        path = folder_of(pretrained_model_name_or_path, subfolder, **kwargs) / CONFIG
        if not path.is_file():
            raise DeltatuneError(f"can't find {CONFIG!r} at {path.parent}, so this is not a saved adapter")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise DeltatuneError(f"{path}: not valid JSON ({e})") from e
        found = found.get("deltatune", {}).get("peft", found)  # there when only we can read the tensors
        kind = found.get("peft_type")
        if kind not in CONFIGS:
            raise DeltatuneError(f"{path}: peft_type {kind!r} is not offered here{nearest(str(kind), CONFIGS)}")
        known = {f.name for f in dataclasses.fields(CONFIGS[kind])}
        if unknown := found.keys() - known - {"deltatune", "runtime_config"}:
            warnings.warn(f"{path}: unknown keys are ignored: {', '.join(sorted(unknown))}", stacklevel=2)
        return CONFIGS[kind](**{k: v for k, v in found.items() if k in known})


@dataclass
class EvaConfig:
    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class LoraConfig(PeftConfig):
    """LoRA and DoRA. Fields that would change the mathematics in ways not offered here are refused on use."""

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if isinstance(self.eva_config, dict):
            self.eva_config = EvaConfig(**self.eva_config)
        elif self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        if self.bias not in ("none", "all", "lora_only"):
            raise DeltatuneError(f"bias is 'none', 'all' or 'lora_only', got {self.bias!r}")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise DeltatuneError("layers_to_transform and layers_pattern need target_modules to be a list of names")
        _layers(self)


@dataclass
class AdaLoraConfig(LoraConfig):
    rank_pattern: dict[str, Any] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if not self.total_step or self.total_step <= 0:
            raise DeltatuneError(f"AdaLoraConfig: give total_step, the number of training steps, got {self.total_step}")
        if self.tinit >= self.total_step - self.tfinal:
            ends = f"tinit {self.tinit} and tfinal {self.tfinal}"
            raise DeltatuneError(f"AdaLoraConfig: {ends} leave none of {self.total_step} steps between them")


@dataclass
class IA3Config(PeftConfig):
    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        both = isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set)
        if both and (stray := self.feedforward_modules - self.target_modules):  # type: ignore[operator]
            raise DeltatuneError(f"feedforward_modules must be among target_modules; {', '.join(sorted(stray))} is not")


@dataclass
class VeraConfig(PeftConfig):
    """The projections are saved whether or not `save_projection` asks for it: they are PEFT's, drawn from its key."""

    r: int = 256
    target_modules: Names = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA
        if self.bias not in ("none", "all", "vera_only"):
            raise DeltatuneError(f"bias is 'none', 'all' or 'vera_only', got {self.bias!r}")
        _layers(self)


@dataclass
class LycorisConfig(PeftConfig):
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)


@dataclass
class LoHaConfig(LycorisConfig):
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: Names = None
    exclude_modules: Names = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA
        _layers(self)


@dataclass
class LoKrConfig(LycorisConfig):
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: Names = None
    exclude_modules: Names = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR
        if self.init_weights not in (True, False, "lycoris"):
            raise DeltatuneError(f"init_weights is True, False or 'lycoris', got {self.init_weights!r}")
        _layers(self)


@dataclass
class PromptLearningConfig(PeftConfig):
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.prompt_tuning_init = _member(PromptTuningInit, "prompt_tuning_init", self.prompt_tuning_init)
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise DeltatuneError(f"prompt_tuning_init='TEXT' needs {name}")


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
        name, kinds = "encoder_reparameterization_type", PromptEncoderReparameterizationType
        self.encoder_reparameterization_type = _member(kinds, name, self.encoder_reparameterization_type)


CONFIGS: dict[str, type[PeftConfig]] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "IA3": IA3Config,
    "VERA": VeraConfig,
    "LOHA": LoHaConfig,
    "LOKR": LoKrConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "P_TUNING": PromptEncoderConfig,
}


def _layers(config: Any) -> None:
    if config.layers_pattern and config.layers_to_transform is None:
        raise DeltatuneError("layers_pattern needs layers_to_transform")


def _member(kind: type[Enum], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = [str(m.value) for m in kind]
        raise DeltatuneError(f"{name} {value!r} is none of {', '.join(known)}{nearest(str(value), known)}") from None


def _plain(v: Any) -> Any:
    if isinstance(v, Enum):
        return v.value
    if dataclasses.is_dataclass(v) and not isinstance(v, type):
        return dataclasses.asdict(v)
    return sorted(v) if isinstance(v, (set, frozenset)) else list(v) if isinstance(v, tuple) else v


def folder_of(model_id: str | Path, subfolder: str | None = None, revision: str | None = None, **ignored: Any) -> Path:
    """The local folder of an adapter: as given, or fetched from the hub when there is no such folder."""
    if not (path := Path(model_id)).exists():
        try:
            files = ["adapter_*", f"{subfolder}/adapter_*"] if subfolder else ["adapter_*"]
            path = Path(snapshot_download(str(model_id), revision=revision, allow_patterns=files))
        except Exception as e:  # whatever keeps it from being fetched: the answer is the same
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise DeltatuneError(f"can't find {CONFIG!r} at {model_id}: no such folder, and no hub: {reason}") from e
    return path / (subfolder or "")
