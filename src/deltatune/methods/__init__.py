"""One file a method, each reading like its paper. Called, the package lists all that is offered: `dt.methods()`."""

import importlib
import sys
from types import ModuleType


class _Listing(ModuleType):
    def __call__(self) -> dict[str, type]:
        """Every method, init, callback and router, by the name that its paper gives it."""
        return importlib.import_module("deltatune.registry").found()


sys.modules[__name__].__class__ = _Listing
