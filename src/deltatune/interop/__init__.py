"""Others' formats, read and written. Importing this package makes `Adapter.save` and `load` speak PEFT's, and `load`
loralib's."""

from deltatune.interop import loralib, peft_format

__all__ = ["loralib", "peft_format"]
