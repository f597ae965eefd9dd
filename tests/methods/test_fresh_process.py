"""A file is read by a process that has used nothing of what it names."""

import subprocess
import sys

import pytest

import deltatune as dt
from deltatune.models.tiny import tiny

READ = """
import sys
from deltatune.core import load
from deltatune.models.tiny import tiny
print(type(load(tiny("llama"), sys.argv[1]).method).__name__)
"""


@pytest.mark.parametrize("method", [dt.SAID(d=64), dt.Mixture(n=2)])
def test_an_adapter_is_loaded_where_its_method_was_never_imported(method, tmp_path):
    dt.attach(tiny("llama"), method).save(tmp_path)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split()[-1] == type(method).__name__
