"""Data: rows from files, their formats, templates, encoding, packing and batches."""

from deltatune.data.encode import IGNORED, Encoded, Example, Summary, build
from deltatune.data.formats import (
    FORMATS,
    Conversation,
    Dataset,
    Labelled,
    Pair,
    Preference,
    Tagged,
    Text,
    load,
    normalise,
    recognise,
)
from deltatune.data.loader import Batches, split
from deltatune.data.packing import Batch, attention_mask_4d, pack, packed, padded
from deltatune.data.readers import DataError, Rows, read
from deltatune.data.templates import Template, resolve

__all__ = [
    "FORMATS", "IGNORED", "Batch", "Batches", "Conversation", "DataError", "Dataset", "Encoded", "Example", "Labelled",
    "Pair", "Preference", "Rows", "Summary", "Tagged", "Template", "Text", "attention_mask_4d", "build", "load",
    "normalise", "pack", "packed", "padded", "read", "recognise", "resolve", "split",
]  # fmt: skip
