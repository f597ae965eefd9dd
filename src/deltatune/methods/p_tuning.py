"""P-tuning: GPT Understands, Too. Liu et al., AI Open 2023. arXiv:2103.10385

    h = MLP([LSTM_forward(e); LSTM_backward(e)]),   e, h in R^{n x d}                      (sec. 2.2)
    {h_0:i, E(x), h_i+1:j, E(y), h_j+1:n}      pseudo-tokens anywhere among the embedded tokens of a template

Two layers of LSTM, d/2 wide in each direction, then Linear, ReLU, Linear. In the end `flatten` leaves h alone. The
embeddings of a decoder are left as they are if there is an encoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core import DeltatuneError, Intervention, Select, Site
from deltatune.methods.prompt import CrossMask
from deltatune.models.prompting import Placed, Positioned, Prompt, embedding_path, embeddings, layout


@dataclass(frozen=True, kw_only=True)
class PTuning(Positioned):
    """`length` n, `encoder` the network that makes h, None to train h itself; `layers` of its LSTM, or of the MLP.

    token: the id of a reserved token, of which each row's template holds n, where the pseudo-tokens go; a row of
        several templates, as packed ones are, holds n for each. None: rows hold none, and the n stand before their
        tokens, after [CLS].
    hidden: width of the LSTM in each direction, d/2 by default; of the MLP, d.
    """

    lr: ClassVar[float] = 5e-3
    length: int = 9
    token: int | None = None
    encoder: Literal["lstm", "mlp"] | None = "lstm"
    layers: int = 2
    hidden: int | None = None

    usual = ("backbone", "decoder")
    at = ("call",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("length", 1), ("layers", 1), ("hidden", 1), ("token", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise DeltatuneError(f"PTuning: {name} must be at least {least}, got {value}")
        if self.encoder not in ("lstm", "mlp", None):
            raise DeltatuneError(f"PTuning: encoder is 'lstm', 'mlp' or None, got {self.encoder!r}")

    def select(self, model: nn.Module) -> Select:
        if self.token is None or self.targets is not None:
            return self.targets
        return re.escape(embedding_path(model))

    def flat(self) -> PTuning:
        return replace(self, encoder=None)

    def build(self, site: Site, shared: nn.Module | None) -> Intervention:
        if self.token is not None:
            if self.token >= (size := getattr(site.module, "num_embeddings", 0)):
                raise DeltatuneError(f"PTuning: token {self.token} is not among the {size} of the vocabulary")
            return Placed(self.token, self.start(site, site.module))
        at = layout(site)
        if site.path.rpartition(".")[2] == "decoder" and at.whole:
            return CrossMask(self.length)
        return Prompt(at, self.start(site, embeddings(site.module)))

    def start(self, site: Site, table: Any) -> Tensor | nn.Module:
        """e (n, d), N(0, 1), and the network around it."""
        e = torch.randn(self.length, table.embedding_dim, **site.like)
        if self.encoder is None:
            return e
        return (BiLSTM if self.encoder == "lstm" else MLP)(e, self.layers, self.hidden, site.like)


class BiLSTM(nn.Module):
    """`lstm` is torch's weights. They run here, because torch's kernels differ, and round otherwise, where no gradient
    is wanted: what `flatten` keeps is what was trained."""

    def __init__(self, e: Tensor, layers: int, hidden: int | None, like: dict[str, Any]) -> None:
        super().__init__()
        d, hidden = e.shape[1], hidden or e.shape[1] // 2
        self.e, self.layers = nn.Parameter(e), layers
        self.lstm = nn.ParameterDict(nn.LSTM(d, hidden, layers, bidirectional=True, **like).named_parameters())
        wide = 2 * hidden
        self.mlp = nn.Sequential(nn.Linear(wide, wide, **like), nn.ReLU(), nn.Linear(wide, d, **like))

    def forward(self) -> Tensor:
        x: Tensor = self.e
        for i in range(self.layers):
            w, u, b, c = (self._both(f"{name}_l{i}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            z = torch.stack([x, x.flip(0)]) @ w.mT + (b + c)[:, None]  # (2 directions, n, 4 hidden)
            h = s = z.new_zeros(2, 1, u.shape[2])
            states = []
            for now in z.split(1, 1):
                enter, keep, new, show = (now + h @ u.mT).chunk(4, -1)
                s = keep.sigmoid() * s + enter.sigmoid() * new.tanh()
                h = show.sigmoid() * s.tanh()
                states.append(h)
            ahead, back = torch.cat(states, 1)
            x = torch.cat([ahead, back.flip(0)], -1)
        return self.mlp(x)  # type: ignore[no-any-return]

    def _both(self, name: str) -> Tensor:
        return torch.stack([self.lstm[name], self.lstm[f"{name}_reverse"]])


class MLP(nn.Module):
    def __init__(self, e: Tensor, layers: int, hidden: int | None, like: dict[str, Any]) -> None:
        super().__init__()
        d = e.shape[1]
        widths = [d, *[hidden or d] * (layers - 1), d]
        self.e = nn.Parameter(e)
        self.mlp = nn.Sequential(*[m for a, b in pairwise(widths) for m in (nn.ReLU(), nn.Linear(a, b, **like))][1:])

    def forward(self) -> Tensor:
        return self.mlp(self.e)  # type: ignore[no-any-return]
