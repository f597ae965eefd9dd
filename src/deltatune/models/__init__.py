"""What is known of Hugging Face architectures. Importing it teaches core their layers, parts and attention."""

from transformers.pytorch_utils import Conv1D

from deltatune.models import anatomy, attention
from deltatune.storage import layers

layers.register(Conv1D, transposed=True)

__all__ = ["anatomy", "attention"]
