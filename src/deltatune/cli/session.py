"""A base model with its adapters, ready to answer: what `chat`, `generate`, `merge` and `export` share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import deltatune.interop  # noqa: F401  teaches `load` PEFT's format
from deltatune.core import DeltatuneError, load, nearest, using
from deltatune.data import Template, read, resolve
from deltatune.data.readers import Problems
from deltatune.models.loading import load_base, load_tokenizer
from deltatune.routers.per_row import PerRow
from deltatune.serve import ProxyTuning
from deltatune.train.merged import quantised, stop_tokens

Message = dict[str, Any]
Base = Annotated[str | None, typer.Argument(help="A folder, a hub name or 'default'; else the adapter's own.")]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="DIR or NAME=DIR of an adapter; repeatable.")]
System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]
Tokens = Annotated[int, typer.Option(help="The longest answer.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0)]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens with this much probability.", min=0, max=1)]
Seed = Annotated[int, typer.Option(help="Of the drawing.")]
TemplateName = Annotated[str | None, typer.Option("--template", help="chat, human-assistant, alpaca or a Jinja file.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Proxy = Annotated[str | None, typer.Option(help="A small base, to tune BASE by proxy; else --proxy-adapter's own.")]
ProxyAdapter = Annotated[str | None, typer.Option(help="DIR of the small base's adapter: its effect is added to BASE.")]
ProxyTemplate = Annotated[str | None, typer.Option(help="The adapter's prompts; else as saved beside it.")]
Alpha = Annotated[float | None, typer.Option(help="Times this, 1 by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        if not self.temperature:
            unset = dict.fromkeys(("temperature", "top_p", "top_k"))  # the base's own would only cause warnings
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, **unset}
        return vars(self) | {"do_sample": True, "top_k": 0}


@dataclass
class Session:
    """`names` are the attached adapters, in the order given; `small` is the expert that tunes the model by proxy."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    names: list[str]
    small: Session | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        self._generate: Any = self.model.generate
        if (small := self.small) is not None:
            proxy = ProxyTuning(
                self.model, small.model, small.names[0], self.tokenizer, small.tokenizer, self.alpha
            )  # fmt: skip
            self._generate = proxy.generate

    def answer(self, conversations: Sequence[list[Message]], names: Sequence[str | None], sampling: Sampling,
               streamer: TextStreamer | None = None) -> list[str]:  # fmt: skip
        """The answers to a batch of conversations, each under its own adapter; None is the base alone."""
        given = self._prompts(conversations)
        expert = {} if self.small is None else {"expert": self.small._prompts(conversations)}
        with self._under(names):
            out = self._generate(
                **given, **expert, **sampling.options(), streamer=streamer, pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self._stops(),
            )  # fmt: skip
        new = out if self.model.config.is_encoder_decoder else out[:, given["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _prompts(self, conversations: Sequence[list[Message]]) -> dict[str, torch.Tensor]:
        texts = [self.template.render(self.tokenizer, c, add_generation_prompt=True) for c in conversations]
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        return {k: batch[k].to(self.model.device) for k in ("input_ids", "attention_mask")}

    def _stops(self) -> list[int]:
        own = stop_tokens(self.model, self.tokenizer)
        more = [] if self.small is None else self.small._stops()
        return own + [token for token in more if token not in own and token < len(self.tokenizer)]

    def _under(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        if not self.names:
            return nullcontext()
        if len(set(names)) == 1:
            return using(self.model, *(name for name in names[:1] if name is not None))
        return using(self.model, router=PerRow(names))


def open_session(base: str | None, adapters: Sequence[str] | None, *, template: str | None = None, dtype: str = "auto",
                 proxy: str | None = None, proxy_adapter: str | None = None, proxy_template: str | None = None,
                 alpha: float | None = None) -> Session:  # fmt: skip
    """`base` with every adapter (`DIR` or `NAME=DIR`) on it, and the tokenizer and template saved beside an adapter.

    proxy_adapter: that of the small base `proxy`, whose effect on the logits, times `alpha`, is added to the base's.
    """
    given = {"--proxy": proxy, "--proxy-template": proxy_template, "--alpha": alpha}
    if proxy_adapter is None and (lone := next((name for name, value in given.items() if value is not None), None)):
        raise DeltatuneError(f"{lone} needs --proxy-adapter, a small base's adapter that tunes this base by proxy")
    pairs = named(adapters or [])
    model, tokenizer = opened(base, pairs, dtype=dtype)
    small = None
    if proxy_adapter is not None:
        small = open_session(proxy, [proxy_adapter], template=proxy_template, dtype=dtype)
    resolved = resolve(template, tokenizer)
    return Session(model, tokenizer, resolved, list(pairs), small, 1.0 if alpha is None else alpha)


def opened(base: str | None, folders: Mapping[str, Path], task: str | None = None, *, dtype: str = "auto"
           ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:  # fmt: skip
    """The base, by default the adapters' own, with the head for `task` and every adapter on it, and its tokenizer."""
    saved = list(folders.values())
    base = base or base_of(saved)
    tokenizer = load_tokenizer(base, saved)
    model = load_base(base, task, dtype=dtype, quantize=quantised(saved))
    if (room := len(model.get_input_embeddings().weight)) < len(tokenizer):  # type: ignore[arg-type]
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the model {room}"
        raise DeltatuneError(f"base: {base}: {sizes}; they do not belong together")
    if not getattr(model, "is_quantized", False):  # which is where it was loaded
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    for name, folder in folders.items():
        load(model, folder, name)
    return model, tokenizer


def named(adapters: Sequence[str]) -> dict[str, Path]:
    """Name -> folder, for each `DIR` (named as its folder is) or `NAME=DIR`."""
    found: dict[str, Path] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else given).expanduser()
        if not (path / "adapter_config.json").is_file():
            raise DeltatuneError(f"adapter: {path}: no adapter_config.json there, so this is not a saved adapter")
        name = name if equals else path.resolve().name.replace(".", "-")
        if name in found:
            raise DeltatuneError(f"adapter: {name!r} is both {found[name]} and {path}; tell them apart with NAME=DIR")
        found[name] = path
    return found


def known(name: str | None, names: Iterable[str]) -> str | None:
    """`name`, None being the base; raises when no adapter is called so."""
    if name is not None and name not in (names := list(names)):
        hint = nearest(name, names, 1) or f"; there is {', '.join(names)}" if names else "; none was given as --adapter"
        raise DeltatuneError(f"no adapter is called {name!r}{hint}")
    return name


def base_of(adapters: Sequence[Path]) -> str:
    """The base that the adapters say they were trained on."""
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if base := config.get("base_model_name_or_path") or config.get("model_name"):  # PEFT's, or AdapterHub's
            return str(base)
    where = f"{adapters[0]} does not say which base it was trained on; " if adapters else ""
    raise DeltatuneError(f"base: {where}name one, or 'default'")


def read_prompts(file: str, system: str | None = None) -> list[tuple[str, dict[str, Any], list[Message]]]:
    """(origin, row, conversation) of every row of a file, which has `prompt` or `messages`; bad rows come together."""
    problems, found = Problems(), []
    for origin, row in read(file, problems=problems):
        messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            problems.add(origin, "field 'prompt' (text) or 'messages' (role and content each) is missing", row)
        else:
            found.append((origin, row, begin(system) + messages))
    problems.done()
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def begin(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []
