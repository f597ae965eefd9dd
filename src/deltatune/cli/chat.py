"""`deltatune chat`: talk to a base model and its adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer

from deltatune.cli import session as shared
from deltatune.cli.session import Message, Sampling, Session, begin, known, open_session
from deltatune.core import DeltatuneError, nearest

COMMANDS = {
    "/reset": "forget the conversation",
    "/adapter NAME": "answer under this adapter",
    "/base": "answer as the base alone",
    "/help": "show this",
    "/quit": "end",
}
WORDS = [c.split()[0] for c in COMMANDS]


@dataclass
class Talk:
    """`voices` answer each prompt in turn, None being the base; of several, each remembers its own conversation."""

    session: Session
    sampling: Sampling
    system: str | None
    voices: list[str | None]
    console: Console
    heard: dict[str | None, list[Message]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        for voice in self.voices:
            who = voice if len(self.voices) > 1 else None
            if len(self.voices) > 1:
                self.console.print(Text(f"── {voice or 'base'}", "dim"))
            messages = [*self.heard.get(who, begin(self.system)), {"role": "user", "content": text}]
            streamer = TextStreamer(self.session.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
            answer = self.session.answer([messages], [voice], self.sampling, streamer)[0]
            self.heard[who] = [*messages, {"role": "assistant", "content": answer}]

    def obey(self, line: str) -> None:
        word, _, name = line.partition(" ")
        if word == "/reset":
            self.heard.clear()
            self.console.print(Text("conversation forgotten", "dim"))
        elif word in ("/base", "/adapter"):
            self.voices = [known(name.strip(), self.session.names) if word == "/adapter" else None]
            self.console.print(Text(f"answering as {self.voices[0] or 'the base'}", "dim"))
        elif word == "/help":
            self.console.print("\n".join(f"{c:14} {what}" for c, what in COMMANDS.items()))
        else:
            raise DeltatuneError(f"no command {word}{nearest(word, WORDS)}; there are {', '.join(WORDS)}")


def command(
    base: shared.Base = None,
    adapter: shared.Adapters = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base answer first, then each adapter.")] = False,
    system: shared.System = None,
    max_new_tokens: shared.Tokens = 256,
    temperature: shared.Temperature = 0.0,
    top_p: shared.TopP = 1.0,
    seed: shared.Seed = 0,
    template: shared.TemplateName = None,
    dtype: shared.Dtype = "auto",
    proxy: shared.Proxy = None,
    proxy_adapter: shared.ProxyAdapter = None,
    proxy_template: shared.ProxyTemplate = None,
    alpha: shared.Alpha = None,
) -> None:
    """Talk to BASE with its adapters. Reads prompts from standard input, one a line."""
    torch.manual_seed(seed)
    session = open_session(
        base, adapter, template=template, dtype=dtype,
        proxy=proxy, proxy_adapter=proxy_adapter, proxy_template=proxy_template, alpha=alpha,
    )  # fmt: skip
    names: list[str | None] = list(session.names)
    if compare and not names:
        raise DeltatuneError("--compare needs an --adapter to compare the base with")
    talk = Talk(
        session, Sampling(max_new_tokens, temperature, top_p), system,
        [None, *names] if compare else (names or [None])[:1], Console(highlight=False, soft_wrap=True),
    )  # fmt: skip
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  line editing and history in input()

        talk.console.print(Text(" ".join(WORDS), "dim"))
    while True:
        try:
            line = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        try:
            if line:
                (talk.obey if line.startswith("/") else talk.say)(line)
        except KeyboardInterrupt:  # of a long answer, not of the program
            talk.console.print()
        except DeltatuneError as error:
            talk.console.print(Text(str(error), "red"))
