"""The installed wheel, in an environment without the tests' tools: help, a tiny training run, and its adapter used."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tiny_tokenizer import tiny_tokenizer

import deltatune
from deltatune.models.tiny import tiny

COMMAND = sys.argv[1]


def run(*args: str) -> str:
    done = subprocess.run([COMMAND, *args], capture_output=True, text=True)
    assert done.returncode == 0, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


assert "site-packages" in deltatune.__file__, deltatune.__file__
assert "train" in run("--help")
with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} it is"} for i in range(32)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"version": 1, "base": str(root / "base"), "data": {"train": str(root / "rows.jsonl")}, "method": "lora",
              "train": {"max_steps": 3, "batch_size": 8}, "output": str(root / "run")}  # fmt: skip
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    run("train", str(root / "recipe.yaml"))
    assert len((root / "run/metrics.jsonl").read_text().splitlines()) >= 3
    run(
        "generate",
        str(root / "base"),
        "--adapter",
        str(root / "run/adapter"),
        "--prompt",
        "say 3",
        "--max-new-tokens",
        "4",
    )
print("the wheel works: 3 steps trained, adapter saved and used")
