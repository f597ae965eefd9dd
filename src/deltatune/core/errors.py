"""Errors that a user can act on: each message names the place, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltatuneError(ValueError):
    """The input is wrong, not the program; the command line turns it into one line and exit code 1."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A hint for an unknown name: ``; did you mean 'a' or 'b'?``, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
