"""mkdocs hook: the page of methods is made from the classes themselves, and what they can do is probed, not claimed."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from mkdocs.structure.files import File, Files

import deltatune as dt
from deltatune.core import Callback, Init, Method, Router
from deltatune.models.tiny import tiny

PROBED = ("llama", "gpt2", "bloom", "opt", "bert", "roberta", "t5", "bart")
# for defaults that no tiny model can have: no adapters are named, a share of it is less than one of each component
REFERENCES: dict[str, Method] = {
    "AdapterFusion": dt.AdapterFusion(adapters=("a", "b"), methods=(dt.Pfeiffer(), dt.Pfeiffer())),
    "S4": dt.S4(budget=1500),
}
KINDS = {Method: "Methods", Init: "Initialisations", Callback: "Callbacks", Router: "Routers"}


def capabilities(cls: type[Method]) -> dict[str, Any]:
    """What a method does on tiny models: where it attaches, whether it merges, what it trains."""
    row: dict[str, Any] = {"architectures": [], "merges": False, "trained": 0}
    for architecture in PROBED:
        torch.manual_seed(0)
        model = tiny(architecture)
        try:
            adapter = dt.attach(model, REFERENCES.get(cls.__name__) or cls())
        except dt.DeltatuneError:
            continue
        row["architectures"].append(architecture)
        row["merges"] = adapter.mergeable
        row["trained"] = row["trained"] or sum(p.numel() for p in adapter.parameters())
    return row


def matrix() -> str:
    """The capability matrix as a Markdown table."""
    lines = ["| method | merges | " + " | ".join(PROBED) + " |", "|---|---|" + "---|" * len(PROBED)]
    for name, cls in sorted(dt.methods().items()):
        if issubclass(cls, Method):
            can = capabilities(cls)
            marks = ["yes" if a in can["architectures"] else "–" for a in PROBED]
            lines.append(f"| {name} | {'yes' if can['merges'] else '–'} | {' | '.join(marks)} |")
    return "\n".join(lines)


def page() -> str:
    out = [
        "# Methods",
        "",
        "What each does with its defaults, found by attaching it to a tiny model of each architecture; AdapterFusion",
        "fuses two of Pfeiffer's adapters there, and S4 trains 1,500 parameters a block.",
        "",
    ]
    why = "BitFit, of which S4 has some, needs biases, which Llama and T5 do not have"
    out += [matrix(), "", f"A dash: it refuses, and says why ({why}).", ""]
    for kind, title in KINDS.items():
        out += [f"## {title}", ""]
        for name, cls in sorted(dt.methods().items()):
            if issubclass(cls, kind):
                out += [f"### {name}", ""]
                if text := inspect.getdoc(inspect.getmodule(cls)):
                    out += ["```text", text, "```", ""]
                if dataclasses.is_dataclass(cls):
                    fields = [f for f in dataclasses.fields(cls) if f.name != "targets"]
                    options = ", ".join(f"`{f.name}={_default(f)}`" for f in fields)
                    out += [f"Options: {options or 'none'}.", ""]
    return "\n".join(out)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "…" if field.default is dataclasses.MISSING else repr(field.default)


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "methods.md", content=page()))
    return files
