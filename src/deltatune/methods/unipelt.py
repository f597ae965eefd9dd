"""UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning. Mao et al., ACL 2022. arXiv:2110.07577

    attention(Q, [G_P P_k; K], [G_P P_v; V])                     G_P of the attention's input
    W x + G_L B A x                                              at q and v; G_L, of their input x, stands for alpha / r
    u + G_A (W_up relu(W_down x + b_down) + b_up)                u the feed-forward output, x and the sum `Pfeiffer`'s
    G = mean_i sigmoid(w x_i + c)                                with a w and c for each gate              (sec. 3.2)

The paper's mean is over an encoder's whole input, padding included. Here it is, for each token, over the tokens that
its attention may see: in an encoder all but padding, so one G a row, as in the paper; in a packed row those of its
document; in a decoder those so far, for a mean over all would train on the future and change with each new token.
There G differs from query to query, which models that compute attention by themselves (Bloom, Falcon, GPT-J) have no
place for: they are refused. Cross-attention has a prefix, gated by the decoder's tokens, and no LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.core import DeltatuneError, Method, Part, Site, resolve
from deltatune.methods.gated import Gated, GatedAtBlock, GatedAtNorm, GatedLoRA, GatedPrefix, Reading
from deltatune.methods.lora import LowRank
from deltatune.methods.pfeiffer import AtNorm, Pfeiffer
from deltatune.methods.prefix import PrefixTuning
from deltatune.models.anatomy import anatomy
from deltatune.models.attention import looks_up
from deltatune.models.visible import Gate, Visible


@dataclass(frozen=True, kw_only=True)
class UniPELT(PrefixTuning):
    """`length`, `hidden`, `init` and `dropout` are `PrefixTuning`'s; `r` is LoRA's, `size` the adapters' m."""

    lr: ClassVar[float] = 1e-3
    length: int = 10
    hidden: int | None = 512
    r: int = 8
    size: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1 or self.size < 1:
            raise DeltatuneError(f"UniPELT: r and size must be at least 1, got r={self.r}, size={self.size}")
        if self.targets is not None:
            raise DeltatuneError(f"UniPELT: targets={self.targets!r}: it is about whole blocks; leave targets out")

    def parts(self) -> Sequence[Method]:
        visible = Visible()
        prefix = _Prefix(**{f.name: getattr(self, f.name) for f in fields(PrefixTuning)}, visible=visible)
        lora = _LoRA(targets=_Projections(), r=self.r, visible=visible)
        return *prefix.parts(), lora, _Adapter(size=self.size, visible=visible)


@dataclass(frozen=True, kw_only=True)
class _Prefix(PrefixTuning):
    visible: Visible = field(compare=False)

    at: ClassVar[tuple[str, ...]] = ("attention", "call")

    def build(self, site: Site, shared: nn.Module | None) -> Any:
        if not looks_up(site.module):
            raise DeltatuneError(
                f"UniPELT: {site.path} computes attention by itself, so its prefix cannot be weighed for each query; "
                "MAM and S4 run on this architecture"
            )
        if site.at == "call":
            return Reading(site, self.visible)
        return GatedPrefix(super().build(site, shared).source, self.dropout, self.visible)


class _Projections:
    """Selects the modules that make queries and values, but for cross-attention; `rows`: which of theirs do."""

    def __call__(self, path: str, module: nn.Module) -> bool:
        if not path:
            crossed = anatomy(module).cross_attention
            self.rows: dict[str, list[Tensor | None]] = {}
            for m in resolve(module, Part("q", "v")):
                if crossed is None or not re.match(rf"({crossed})\.", m.path):
                    self.rows.setdefault(m.path, []).append(m.rows)
        return path in self.rows


@dataclass(frozen=True, kw_only=True)
class _LoRA(Method):
    visible: Visible = field(compare=False)
    r: int

    at = ("call",)

    def build(self, site: Site, shared: nn.Module | None) -> GatedLoRA:
        assert isinstance(self.targets, _Projections)
        pieces = [replace(site, rows=rows) for rows in self.targets.rows[site.path]]
        return GatedLoRA([(s.rows, LowRank(s, self.r, 1.0), Gate(self.visible, s.shape.in_, **s.like)) for s in pieces])


@dataclass(frozen=True, kw_only=True)
class _Adapter(Pfeiffer):
    visible: Visible = field(compare=False)

    def build(self, site: Site, shared: nn.Module | None) -> Gated:  # type: ignore[override]
        plain = super().build(site, shared)
        d, kind = len(plain.up), GatedAtNorm if isinstance(plain, AtNorm) else GatedAtBlock
        return kind(site, d, self.size, Gate(self.visible, d, **site.like))
