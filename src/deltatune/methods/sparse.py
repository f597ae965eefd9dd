"""Train chosen coordinates of the weights and nothing else. With random ones it is Random Masking: Random Masking Finds
Winning Tickets for Parameter Efficient Fine-tuning. Xu and Zhang, ICML 2024. arXiv:2405.02596

    W' = W + M * D,     M in {0, 1}^{out x in} with int(density out in) ones, fixed

M is drawn at random, or marks the largest |W_ij|, or is given. Only M's ones of D are kept, as indices and values, zero
at the start, so W' = W there. Few random coordinates want a larger learning rate than LoRA does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal
from zlib import crc32

import torch
from torch import nn

from deltatune.core import DeltatuneError, Method, Site, matching
from deltatune.methods.coordinates import Coordinates, check_share, elements


@dataclass(frozen=True, kw_only=True)
class Sparse(Method):
    """`given`: the places in the flattened (out, in) weight of the modules whose path a pattern is, or ends; for all
    other modules `coordinates` says how they are chosen."""

    lr: ClassVar[float] = 1e-2
    density: float = 0.005
    coordinates: Literal["random", "magnitude"] = "random"
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seed: int = 0

    at: ClassVar[tuple[str, ...]] = ("weight",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "density")
        if self.coordinates not in ("random", "magnitude"):
            raise DeltatuneError(f"Sparse: coordinates is 'random' or 'magnitude', got {self.coordinates!r}")

    def build(self, site: Site, shared: nn.Module | None) -> Coordinates:
        size = elements(site)
        given: Any = matching(self.given, site.path, None)
        if given is not None and (len(set(given)) < len(given) or not all(0 <= i < size for i in given)):
            raise DeltatuneError(f"Sparse: given, {site.path}: places must be distinct and lie in 0 ... {size - 1}")
        k = int(self.density * size) if given is None else len(given)
        if not k:
            raise DeltatuneError(f"Sparse: {site.path}: density={self.density} of {size} places is none; raise it")
        unit = Coordinates(site, k, self)
        if site.device.type == "meta":
            return unit
        if given is not None:
            places = torch.tensor(given)
        elif self.coordinates == "magnitude":
            places = site.weight.abs().flatten().topk(k).indices
        else:  # a site's draw depends on the seed and its name alone
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + crc32(f"{site.path}.{site.at}".encode()))
            places = torch.randperm(size, generator=generator)[:k]
        unit.move_to(places.sort().values)
        unit.chosen.fill_(True)
        return unit
