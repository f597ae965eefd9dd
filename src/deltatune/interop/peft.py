"""A drop-in for the package `peft`: classic tutorials run with their import line changed.

    from deltatune.interop.peft import LoraConfig, TaskType, get_peft_model, PeftModel

The model that `get_peft_model` returns is the one it was given, of a subclass of its own class: it stays a
`PreTrainedModel` of the same name, and `isinstance(model, PeftModel)` holds too.
"""

from deltatune.interop.peft_config import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    VeraConfig,
)
from deltatune.interop.peft_method_eva import initialize_lora_eva_weights
from deltatune.interop.peft_model import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)

__all__ = [
    "AdaLoraConfig", "AutoPeftModelForCausalLM", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
    "EvaConfig", "IA3Config", "LoHaConfig", "LoKrConfig", "LoraConfig", "PeftConfig", "PeftModel",
    "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType", "PrefixTuningConfig",
    "PromptEncoderConfig", "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig",
    "PromptTuningInit", "TaskType", "VeraConfig", "get_peft_model", "get_peft_model_state_dict",
    "initialize_lora_eva_weights", "prepare_model_for_kbit_training", "set_peft_model_state_dict",
]  # fmt: skip
