"""Others' formats, read and written. Importing this package makes `Adapter.save` and `load` speak PEFT's, and `load`
loralib's and AdapterHub's."""

from deltatune.interop import adapters, loralib, peft_format

__all__ = ["adapters", "loralib", "peft_format"]
