from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType

import pytest
import typer

from deltatune.cli import main as cli
from deltatune.core import DeltatuneError


def command(monkeypatch: pytest.MonkeyPatch, body: object) -> None:
    """Put a module in place of `deltatune.cli.plan`."""
    module = ModuleType("deltatune.cli.plan")
    module.command = body  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deltatune.cli.plan", module)


def raising(error: BaseException):
    def body() -> None:
        raise error

    return body


def test_help_lists_every_command_and_imports_none() -> None:
    """The package's own face is left out: this is what the command line itself brings in."""
    program = (
        "import importlib.machinery, importlib.util, sys, types\n"
        "package = types.ModuleType('deltatune')\n"
        "package.__path__ = list(importlib.util.find_spec('deltatune').submodule_search_locations)\n"
        "sys.modules['deltatune'] = package\n"
        "from deltatune.cli.main import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "finally:\n"
        "    print([m for m in ('torch', 'transformers', 'deltatune.core') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_version(run, tmp_path, monkeypatch) -> None:
    info = tmp_path / "deltatune-7.8.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deltatune\nVersion: 7.8.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("--version")
    assert result.exit_code == 0 and result.output == "deltatune 7.8.9\n"


def test_a_users_error_is_one_clean_message(run, monkeypatch) -> None:
    command(monkeypatch, raising(DeltatuneError("law.yaml: no key 'lr_rate'; did you mean 'lr'?")))
    result = run("plan")
    assert result.exit_code == 1
    assert result.stderr == "error: law.yaml: no key 'lr_rate'; did you mean 'lr'?\n"


def test_a_bug_keeps_its_traceback(run, monkeypatch) -> None:
    command(monkeypatch, raising(ValueError("not ours")))
    result = run("plan")
    assert type(result.exception) is ValueError


@pytest.mark.parametrize("args", [["plann"], ["plan", "--no-such-option"], ["plan", "surplus"]])
def test_usage(args, run, monkeypatch) -> None:
    command(monkeypatch, lambda: None)
    assert run("plan").exit_code == 0
    assert run(*args).exit_code == 2


def test_interruptions_can_be_resumed(run, monkeypatch) -> None:
    class Interrupted(DeltatuneError): ...

    loop = ModuleType("deltatune.train.loop")
    loop.Interrupted = Interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deltatune.train.loop", loop)
    command(monkeypatch, raising(Interrupted("stopped at step 7; go on with: deltatune train law.yaml --resume")))
    result = run("plan")
    assert result.exit_code == 3 and "go on with" in result.stderr and "error" not in result.stderr
    command(monkeypatch, raising(KeyboardInterrupt()))
    assert run("plan").exit_code == 3
    command(monkeypatch, raising(DeltatuneError("something else")))
    assert run("plan").exit_code == 1


def test_commands_may_be_groups(run) -> None:
    result = run("data", "check", "nowhere.jsonl")
    assert result.exit_code == 1 and "nowhere.jsonl" in result.stderr
    assert run("data", "--help").exit_code == 0


def test_a_command_may_choose_its_exit_code(run, monkeypatch) -> None:
    command(monkeypatch, raising(typer.Exit(1)))
    assert run("plan").exit_code == 1


def test_the_program() -> None:
    """As a shell sees it: standard output, standard error and the exit code."""
    line = [sys.executable, "-c", "from deltatune.cli.main import main; main()"]
    done = subprocess.run([*line, "methods", "lorra"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: no method")
    done = subprocess.run([*line, "methods", "LoRA", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == "LoRA"
