"""The command `deltatune`. Each command's module is imported when it is run, so that `--help` waits for none of them.

Exit codes: 0 done, 1 the user's input is wrong, 2 usage, 3 interrupted and resumable.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "quickstart": "Train a small adapter on sample data and show what it learned.",
    "train": "Train an adapter as a recipe says.",
    "data": "Check a data file, or show what the model is trained on.",
    "plan": "Show what a recipe would train, and the memory it needs.",
    "compare": "Train several methods under one budget, and print one table.",
    "methods": "List every method, or explain one.",
    "chat": "Talk to a base model and its adapters.",
    "generate": "Answer prompts, many at once.",
    "predict": "Classify texts, or tag words, many at once.",
    "merge": "Merge adapters into their base, prove it, and write the model.",
    "export": "Write an adapter for other programs: a Hugging Face folder, or GGUF for llama.cpp.",
}
WRONG, INTERRUPTED = 1, 3
for _name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which tells what it does without
    logging.getLogger(_name).setLevel(logging.ERROR)


class Commands(TyperGroup):
    """The commands by name; only the one that is run is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        return TyperCommand(name, help=COMMANDS[name]) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _imported(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _end("Interrupted.", INTERRUPTED)
        except ValueError as error:
            _end_if_ours(error)
            raise


def _imported(name: str) -> Any:
    """The command of `deltatune.cli.<name>`: its typer `app`, or its function `command`."""
    module = importlib.import_module(f"deltatune.cli.{name}")
    if not sys.stderr.isatty() and (bars := sys.modules.get("transformers.utils.logging")):
        bars.disable_progress_bar()
    if (sub := getattr(module, "app", None)) is None:
        sub = typer.Typer(add_completion=False)
        sub.command(name)(module.command)
    return typer.main.get_command(sub)


def _end_if_ours(error: ValueError) -> None:
    """Exit with the message alone, where the input is wrong or the run was interrupted."""
    from deltatune.core.errors import DeltatuneError

    if isinstance(error, DeltatuneError):
        loop = sys.modules.get("deltatune.train.loop")
        interrupted = isinstance(error, getattr(loop, "Interrupted", ()))
        _end(str(error), INTERRUPTED if interrupted else WRONG)


def _end(message: str, code: int) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    title, colour = ("Interrupted", "yellow") if code == INTERRUPTED else ("Error", "red")
    if console.is_terminal:
        console.print(Panel(Text(message), title=title, title_align="left", border_style=colour), soft_wrap=False)
    else:
        console.print(Text(message if code == INTERRUPTED else f"error: {message}"))
    raise typer.Exit(code) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        found = next(iter(metadata.Distribution.discover(name="deltatune")), None)
        typer.echo(f"deltatune {found.version if found else '(run from source)'}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def root(version: Version = False) -> None:
    """Fit any parameter-efficient method to a frozen base model, train it, prove it, merge it."""


def main() -> None:
    app(prog_name="deltatune")
