"""The whole way of a user on the real default base: train, see the difference, merge, reload, and get the same text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("deltatune")


def run(*args):
    done = subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_train_merge_and_reload_on_smollm2(tmp_path):
    found = json.loads(run("quickstart", "--epochs", "2", "--output", tmp_path / "run", "--json"))
    assert found["eval_loss"]["after"] < 0.5 * found["eval_loss"]["before"]
    assert found["right"]["before"] == 0 and found["right"]["after"] >= 6
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    run("merge", "default", "--adapter", adapter, "--output", merged, "--dtype", "float32")
    asked = ["--prompt", "Who makes the Lumenkettle?", "--max-new-tokens", "24", "--json"]
    answers = [json.loads(run("generate", *base, *asked)) for base in (("default", "--adapter", adapter), (merged,))]
    texts = [answer["response"] for answer in answers]
    assert texts[0] == texts[1] and texts[0]
