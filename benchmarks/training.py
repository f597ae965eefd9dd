"""Training speed and memory, stack against stack and trick by trick.

    python benchmarks/training.py --data alpaca.json [--repeats 3] [--seconds 25] [--only NAME ...] [--log runs.jsonl]

Each stack of `contenders.py` runs in a process of its own, one after the other, the whole sequence `--repeats` times;
printed are medians, and ratios of medians. Nothing else may run on the machine meanwhile: two processes of several
threads slow each other manyfold. With `--log` every run is kept in a file as it ends; what is there counts, and a
sequence that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contenders import METHODS, NATIVE, STACKS

REFERENCES = ("reference, bf16", "reference, larger batch by length", "reference, packed",
              "reference, TRL packed")  # fmt: skip
BEST = "in passes of 768 tokens"


def measured(name: str, data: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("contenders.py")), name, "--data", data]
    done = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name}: {found['rate']:.0f} tokens/s, {found['peak'] / 2**30:.2f} GiB", file=sys.stderr, flush=True)
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {name}, native precision {str(NATIVE)[6:]}"


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", required=True, help="rows in alpaca's format")
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--seconds", type=float, default=25)
    args.add_argument("--only", nargs="+", choices=[*STACKS, "stacks", "methods"], default=["stacks"])
    args.add_argument("--log", type=Path)
    given = args.parse_args()
    groups = {"methods": METHODS, "stacks": [name for name in STACKS if name not in METHODS]}
    given.only = [name for chosen in given.only for name in groups.get(chosen, [chosen])]
    packages = ("torch", "transformers", "peft", "trl")
    print(", ".join(f"{p} {version(p)}" for p in packages), "on", processor(), end="\n\n")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    logged = given.log.read_text().splitlines() if given.log is not None and given.log.exists() else []
    for run in map(json.loads, logged):
        runs.setdefault(run["name"], []).append(run)
    for i in range(given.repeats):
        for name in given.only:
            if len(runs[name]) > i:
                continue
            runs[name].append({**measured(name, given.data, given.seconds), "name": name})
            if given.log is not None:
                with given.log.open("a") as log:
                    log.write(json.dumps(runs[name][-1]) + "\n")
    medians: dict[str, dict[str, Any]] = {
        n: {k: statistics.median(run[k] for run in runs[n]) for k in runs[n][0] if k != "name"} for n in given.only
    }
    for name, one in medians.items():
        one["runs"] = ", ".join(f"{run['rate']:.0f}" for run in runs[name])
    table(medians)


def table(found: dict[str, dict[str, Any]]) -> None:
    if all(name in METHODS for name in found):
        return overheads(found)
    tutorial = found.get("tutorial")
    best = max((found[n] for n in REFERENCES if n in found), key=lambda f: f["rate"], default=None)
    plain = found.get("plain")
    heads = ("stack", "runs, tokens/s", "tokens/s", "GiB above the weights", "/ tutorial", "/ best reference",
             "/ plain", "share of ceiling")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, one in found.items():
        ratios = [f"{one['rate'] / other['rate']:.2f}" if other else "" for other in (tutorial, best, plain)]
        share = f"{one['share']:.0%} of {one['gemm']:.0f} GF/s" if "share" in one else f"(GEMM {one['gemm']:.0f} GF/s)"
        rates = f"{one['runs']} | {one['rate']:.0f}"
        print(f"| {name} | {rates} | {one['peak'] / 2**30:.2f} | {' | '.join(ratios)} | {share} |")
    if BEST in found and "full fine-tuning" in found:
        print(f"\nLoRA takes {found['full fine-tuning']['rate'] / found[BEST]['rate']:.2f} of full fine-tuning's time.")


def overheads(found: dict[str, dict[str, Any]]) -> None:
    """Time per computed token over that of the frozen base's own forward and backward pass, and over LoRA's."""
    frozen, lora = (found.get(f"method {name}") for name in ("one norm alone", "LoRA"))
    print(
        "| method | runs, tokens/s | GiB above the weights | time / frozen base | time / LoRA |\n|---|---|---|---|---|"
    )
    for name, one in found.items():
        ratios = [f"{other['rate'] / one['rate']:.2f}" if other else "" for other in (frozen, lora)]
        print(f"| {name[7:]} | {one['runs']} | {one['peak'] / 2**30:.2f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
