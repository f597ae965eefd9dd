"""Other libraries' formats, read and written. Importing this package makes `Adapter.save` and `load` speak PEFT's."""

from deltatune.interop import peft_format

__all__ = ["peft_format"]
