"""Narrow copies of a backbone's blocks that run beside it, whatever the architecture.

A copy has the block's own class, its heads, and every width divided. It is called with what the block was called with:
masks, positions and ALiBi as they are, so that padding and packing need no thought. Of rotary embeddings it takes every
R-th frequency, which are those of a head R times narrower; of T5's position biases its own; its keys and values lie in
the caller's cache, in layers behind those of the backbone, so that beams and cropping find them there.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.errors import DeltatuneError
from deltatune.core.method import Init, Site
from deltatune.core.select import SLOT
from deltatune.core.units import Base, Intervention
from deltatune.models import anatomy
from deltatune.models.calls import accepted, arguments
from deltatune.models.pruning import Scores, blocks, fill, magnitude, matrices, stream
from deltatune.models.visible import named
from deltatune.storage.layers import plain_class

# the widths of configurations; a model's attribute that is None follows from the others
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim",
          "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "head_dim", "d_kv", "rotary_dim",
          "query_pre_attn_scalar")  # fmt: skip
_BIASES = ("position_bias", "encoder_decoder_position_bias")  # T5's first block makes them, for all
_UNKNOWN = ("deberta-v2", "clip_text_model")  # blocks that are given tables as wide as the model; a pooler inside


@dataclass
class Call:
    """What a block was called with, and the hidden states (batch, tokens, width) that it returned."""

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor

    @property
    def entered(self) -> Tensor:
        """The hidden states that came to it."""
        return self.args[0].detach()  # type: ignore[no-any-return]

    @property
    def cache(self) -> Any:
        given = {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}
        return next((given[n] for n in ("past_key_values", "layer_past") if given.get(n) is not None), None)


Tape = dict[int, Call]
_TAPES: dict[int, list[Tape]] = {}  # of a thread, the innermost last


@contextmanager
def taped(wanted: Iterable[int]) -> Iterator[Tape]:
    """Inside, the calls of the `wanted` blocks of the one backbone that runs, by their numbers."""
    tape: Tape = dict.fromkeys(wanted)  # type: ignore[assignment]
    tapes = _TAPES.setdefault(_thread(), [])
    tapes.append(tape)
    try:
        yield tape
    finally:
        tapes.pop()
        if not tapes:
            _TAPES.pop(_thread(), None)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()


class Tap(Intervention):
    """At a block: writes its calls down for whoever listens."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        for tape in _TAPES.get(_thread(), ()):
            if self.number in tape:
                out = y[0] if isinstance(y, tuple) else y
                tape[self.number] = Call(accepted(call.module), args, kwargs, out.detach())
        return y

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        return units[0](call, *args, **kwargs)


def number(path: str) -> int:
    """The number of the block at `path` in its stack."""
    return int(path.rpartition(".")[2])


class Side(nn.Module):
    """`rungs`: copies, R times narrower, of the blocks `kept` (None: all) of the backbone at `site`, and `norm`, the
    one after the last of them. `wide` and `narrow` are the widths of the two residual streams."""

    def __init__(self, site: Site, reduction: int, kept: tuple[int, ...] | None) -> None:
        super().__init__()
        config, found = site.config, blocks(site.model, site.path)
        self.path = site.path
        self.kept = tuple(range(len(found))) if kept is None else kept
        if not found or getattr(config, "model_type", None) in _UNKNOWN:
            raise DeltatuneError(f"{site.path or 'the model'}: no narrower copy of its blocks is known; use adapters")
        if self.kept[-1] >= len(found):
            raise DeltatuneError(
                f"{site.path or 'the model'} has {len(found)} blocks and none of number {self.kept[-1]}"
            )
        frequencies = [len(b) for m in site.module.modules() for n, b in m._buffers.items() if n == "inv_freq"]  # type: ignore[arg-type]
        self.rotary = bool(frequencies) or any("embed_positions" in m._buffers for m in site.module.modules())
        slim = _narrowed(config, site.path, reduction, self.rotary)
        self.wide, self.narrow = anatomy.hidden(config), anatomy.hidden(slim)
        self.stride = anatomy.head_dim(config) // anatomy.head_dim(slim)
        if any(n % self.stride for n in frequencies):
            raise DeltatuneError(f"reduction={reduction} does not divide the {frequencies[0]} rotary frequencies")
        self.start = _vacant(site, len(found))
        self.rungs = nn.ModuleList(
            _copy(found[i][1], slim, i, self.start + j, j == 0, site.like) for j, i in enumerate(self.kept)
        )
        centred = any(isinstance(m, nn.LayerNorm) for m in self.rungs.modules())
        self.norm = (nn.LayerNorm if centred else nn.RMSNorm)(self.narrow, **site.like)

    def runner(self, tape: Tape, memory: Tensor | None) -> Callable[[int, Tensor], Tensor]:
        """A function that runs rung j on g, in order. `memory`: the narrow states that an encoder's ladder made."""
        biases: dict[str, Any] = dict.fromkeys(_BIASES)
        if missing := [i for i in sorted(tape) if tape[i] is None]:
            raise DeltatuneError(f"block {missing[0]} of {self.path} did not run; set the layerdrop of its config to 0")
        if (cache := tape[self.kept[0]].cache) is not None:
            self._reserve(cache)

        def run(j: int, g: Tensor) -> Tensor:
            call, dtype = tape[self.kept[j]], next(self.rungs[j].parameters()).dtype

            def own(name: str, value: Any) -> Any:
                if name in biases:
                    return biases[name]
                if name == "encoder_hidden_states" and value is not None:
                    return None if memory is None else memory.to(dtype)
                if name == "position_embeddings" and value is not None:
                    return tuple(t[..., :: self.stride].to(dtype) for t in value)
                return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

            args = [g, *(own(n, v) for n, v in zip(call.names[1:], call.args[1:], strict=False))]
            y = self.rungs[j](*args, **{n: own(n, v) for n, v in call.kwargs.items()})
            if _BIASES[0] in call.names:
                biases.update(zip(_BIASES, y[1:], strict=False))
            return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

        return run

    def _reserve(self, cache: Any) -> None:
        """Layers for the rungs' keys and values, each of the kind that its block has."""
        both = (cache.self_attention_cache, cache.cross_attention_cache) if hasattr(cache, "is_updated") else (cache,)
        for one in both:
            others = named(one)  # which need no number of their own, as the rungs do
            mine = [layer for layer in one.layers if all(layer is not other for other in others)]
            mine += [_fresh(mine[0]) for _ in range(self.start - len(mine))]
            one.layers[:] = [*mine, *(_fresh(mine[i]) for i in self.kept[len(mine) - self.start :]), *others]

    def prune(self, model: nn.Module, scores: Scores) -> None:
        """Give the rungs those rows and columns of their blocks that `scores` finds to matter most."""
        kept, mine = stream(model, self.narrow, scores), blocks(model, self.path)
        for i, rung in zip(self.kept, self.rungs, strict=True):
            fill(model, mine[i], mine[0][1], rung, kept, self.rotary, scores)


class Beside(Intervention):
    """At a backbone: a side network that reads its blocks' outputs, and whose states take the place of its own.

    The encoder that a decoder reads returns [the backbone's states | the side's]; a decoder takes both apart again."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.side = side
        self.waits: Any = None

    def climb(self, tape: Tape, memory: Tensor | None) -> Tensor:
        """The side's states (batch, tokens, narrow). `memory`: those of the encoder's side network."""
        raise NotImplementedError

    def states(self, h: Tensor, g: Tensor) -> Tensor | None:
        """What takes the place of the backbone's states h, given the side's; None where a decoder reads these."""
        raise NotImplementedError

    def forward(self, call: Base, *args: Any, **kwargs: Any) -> Any:
        return beside([self], None, call, arguments(call.module, args, kwargs))

    @classmethod
    def batched(cls, units: Sequence[Any], rows: Tensor, call: Any, *args: Any, **kwargs: Any) -> Any:
        return beside(units, rows, call, arguments(call.module, args, kwargs))

    def prune(self, model: nn.Module, scores: Scores = magnitude) -> None:
        self.side.prune(model, scores)

    def matrices(self, model: nn.Module) -> list[nn.Module]:
        """The layers that `prune` asks the scores of."""
        return matrices(model)

    def await_data(self, init: Init) -> None:
        self.waits, self.grows = init, ("alpha",)  # type: ignore[misc]

    def expect(self, shapes: Mapping[str, torch.Size]) -> None:
        """One that is loaded has had its data."""
        if any(shapes.get(n) != getattr(self, n).shape for n in self.grows):
            raise DeltatuneError(f"{self.grows} of the side network at {self.side.path} do not fit {dict(shapes)}")
        self.waits = None


def beside(units: Sequence[Beside], rows: Tensor | None, call: Base, a: dict[str, Any]) -> Any:
    """One call of a backbone for `units`, all of them at work on all rows, so that caches hold whole batches."""
    memory, d, widest = None, units[0].side.wide, max(u.side.narrow for u in units)
    if (given := a.get("encoder_hidden_states")) is not None:
        if given.shape[-1] == d:
            raise DeltatuneError("these encoder states were made without the side network; run the encoder again")
        a["encoder_hidden_states"], memory = given[..., :d], given[..., d:]
    others = rows is not None and bool((rows < 0).any())  # who may train what is inside the backbone
    with nullcontext() if others else torch.no_grad(), taped({0}.union(*(u.side.kept for u in units))) as tape:
        out = call(**a)
    h = out[0]
    own = []
    for u in sorted(units, key=lambda u: u.side.start):
        g = u.climb(tape, None if memory is None else memory[..., : u.side.narrow])
        if g.shape[:-1] != h.shape[:-1]:
            raise DeltatuneError("prompts inside of a side network: activate the adapter that has them after it")
        y = u.states(h.detach(), g)
        mine = F.pad(g, (0, widest - g.shape[-1])) if y is None else y
        own.append((units.index(u), mine.to(h.dtype), y is None))
    y = torch.cat([h, h.new_zeros(*h.shape[:-1], widest)], -1) if own[0][2] else h
    for i, mine, narrow in own:
        mine = torch.cat([h.detach(), mine], -1) if narrow else mine
        y = mine if rows is None else torch.where((rows == i)[:, None, None], mine, y)
    return _returned(call.module, out, y)


def _returned(module: Any, out: Any, y: Tensor) -> Any:
    """What the backbone returns, with y for its last hidden states."""
    pooler = getattr(module, "pooler", None)
    if isinstance(out, tuple):
        return (y, pooler(y), *out[2:]) if pooler is not None else (y, *out[1:])
    out["last_hidden_state"] = y
    if out.get("pooler_output") is not None:
        if pooler is None:
            raise DeltatuneError(f"{plain_class(type(module)).__name__} pools in a way that is not known; use adapters")
        out["pooler_output"] = pooler(y)
    return out


def read_by_decoder(site: Site) -> bool:
    """Whether this is the encoder of a model that has a decoder too."""
    known = anatomy.anatomy(site.model)
    mine = known.encoder is not None and re.fullmatch(known.encoder, site.path) is not None
    return mine and "decoder" in anatomy.parts(site.model)


def output_width(site: Site) -> int:
    """Width of the states that the backbone returns: OPT can project them."""
    return int(getattr(site.config, "word_embed_proj_dim", anatomy.hidden(site.config)))


def _narrowed(config: Any, path: str, reduction: int, rotary: bool) -> Any:
    """The configuration with its widths divided; heads of rotary embeddings stay at least 2 wide."""
    slim = copy.deepcopy(config)
    for name in WIDTHS:
        width = vars(config).get(name)
        if isinstance(width, int) and not isinstance(width, bool):
            least = 2 if rotary and name == "head_dim" else 1
            if width % reduction and width // reduction >= least:
                raise DeltatuneError(f"reduction={reduction} does not divide {name}={width} of {path or 'the model'}")
            setattr(slim, name, max(width // reduction, least))
    if "head_dim" not in vars(config) and anatomy.hidden(slim) % anatomy.heads(slim):
        raise DeltatuneError(f"reduction={reduction} leaves {anatomy.heads(slim)} heads a width of {slim.hidden_size}")
    return slim


def _copy(block: nn.Module, config: Any, index: int, layer: int, first: bool, like: Mapping[str, Any]) -> nn.Module:
    """A block of the same class, made for `config`; `layer`: its place in the cache."""
    cls = plain_class(type(block))
    options = {"config": config, "layer_idx": index, "has_relative_attention_bias": first}
    taken = inspect.signature(cls.__init__).parameters
    with torch.device(like["device"]):
        twin: nn.Module = cls(**{n: v for n, v in options.items() if n in taken}).to(like["dtype"])
    for module in twin.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = layer  # type: ignore[assignment]
    return twin


def _vacant(site: Site, depth: int) -> int:
    """The first layer of a cache that neither the backbone nor another ladder at it uses."""
    slot: Any = site.module._modules.get(SLOT)
    others = () if slot is None else [m for m in slot.modules() if isinstance(m, Side)]
    return max([depth, *(m.start + len(m.kept) for m in others)])


def _fresh(layer: Any) -> Any:
    """An empty layer of a cache, like this one."""
    return type(layer)(**{n: getattr(layer, n) for n in ("max_cache_len", "sliding_window") if hasattr(layer, n)})
