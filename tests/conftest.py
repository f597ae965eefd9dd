"""Property tests draw the same examples on every run of CI, and new ones elsewhere."""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("repeatable")
