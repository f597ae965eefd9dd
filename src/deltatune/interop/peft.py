"""A drop-in for the package `peft`: classic tutorials run with their import line changed.

    from deltatune.interop.peft import LoraConfig, TaskType, get_peft_model, PeftModel

The model that `get_peft_model` returns is the one it was given, of a subclass of its own class: it stays a
`PreTrainedModel` of the same name, and `isinstance(model, PeftModel)` holds too.
"""

from deltatune.interop.peft_config import (
    AdaLoraConfig,
    IA3Config,
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
)
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
    "IA3Config", "LoraConfig", "PeftConfig", "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification", "PeftType", "PrefixTuningConfig", "PromptEncoderConfig",
    "PromptEncoderReparameterizationType", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit", "TaskType",
    "get_peft_model", "get_peft_model_state_dict", "prepare_model_for_kbit_training", "set_peft_model_state_dict",
]  # fmt: skip
