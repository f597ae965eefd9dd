"""EVA: Parameter Efficient Fine-tuning via Explained Variance Adaptation. Paischer et al., NeurIPS 2025.
arXiv:2410.07170

    X = U S V',    A = V'_{1..r_i},    B = 0                                               (alg. 1)
    x_ij = S_ij^2 / |X_i|^2,    r_i: how many of site i's x_ij are among the largest N r of all sites

X_i (tokens, in) are the inputs of site i, of which only the leading rho r right singular vectors are held: with each
batch X_b they become those of [S V'; X_b], until every one has a cosine of tau or more with the one before. So ranks
move between the N sites, up to rho r, and their sum stays; a site keeps at least one. s is that of the rank before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.core import DataInit, DeltatuneError, Waiting
from deltatune.core.start import Losses, inputs

_EXACT, _MORE, _NITER = 512, 8, 8  # sides up to which, directions, and iterations of a randomised decomposition beyond


@dataclass(frozen=True, kw_only=True)
class EVA(DataInit):
    """`rho`: a site's rank is at most rho times what it had, 1 for ranks that stay. `tau`: when a site is done."""

    batches: int = 32
    rho: float = 2.0
    tau: float = 0.99

    elsewhere: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1 or not 0 <= self.tau <= 1:
            raise DeltatuneError(f"EVA: rho={self.rho}, tau={self.tau}: give rho >= 1 and tau in [0, 1]")

    @torch.no_grad()
    def fill(self, sites: Sequence[Waiting], model: nn.Module, losses: Losses) -> None:
        most = int(self.rho * max(len(s.delta.a) for s in sites))
        spectra: dict[nn.Module, Spectrum] = {}
        last: list[tuple[Tensor, Spectrum]] = []

        def see(module: nn.Module, x: Tensor) -> None:
            if not last or last[0][0] is not x:
                last[:] = [(x, spectra.get(module) or Spectrum(most, self.tau))]
                last[0][1].add(x)
            spectra[module] = last[0][1]  # modules with the same input share one

        with inputs(model, [s.module for s in sites], see):
            for _ in losses(self.batches):
                if all(spectrum.done for spectrum in spectra.values()):
                    break
        for site in sites:
            r, got = len(site.delta.a), len(spectra[site.module].v) if site.module in spectra else 0
            if got < min(r, site.delta.a.shape[1]):
                raise DeltatuneError(f"EVA: {site.path!r}: {got} directions for r={r}: give more batches, or a lower r")
        for site, r in zip(sites, self.ranks(sites, spectra), strict=True):
            site.delta.start_at(spectra[site.module].v[:r])

    def ranks(self, sites: Sequence[Waiting], spectra: dict[nn.Module, Spectrum]) -> list[int]:
        """Of each site, as many as its shares of variance are among the largest of all."""
        shares = [spectra[s.module].shares()[: int(self.rho * len(s.delta.a))] for s in sites]
        found = [min(1, len(x)) for x in shares]
        left = sum(min(len(s.delta.a), len(x)) for s, x in zip(sites, shares, strict=True)) - sum(found)
        rest = [(-x, i) for i, own in enumerate(shares) for x in own[1:].tolist()]
        for _, i in sorted(rest)[:left]:
            found[i] += 1
        return found


class Spectrum:
    """The leading `k` right singular vectors `v` (k, in) and values `sigma` of all rows that were added."""

    def __init__(self, k: int, tau: float) -> None:
        self.k, self.tau, self.done, self.total = k, tau, False, 0.0
        self.sigma, self.v = torch.empty(0), torch.empty(0, 0)

    def add(self, x: Tensor) -> None:
        if self.done or not len(x):
            return
        self.total += float(x.double().square().sum())
        old = self.v
        sigma, v = _leading(torch.cat([self.sigma[:, None] * old, x]) if len(old) else x, self.k)
        self.done = len(old) == len(v) and bool(((old * v).sum(1).abs() >= self.tau).all())
        self.sigma, self.v = sigma, v

    def shares(self) -> Tensor:
        """Of the sum of squares of all rows."""
        return self.sigma.double().square() / self.total


def _leading(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, *x.shape)
    if min(x.shape) <= max(_EXACT, k + _MORE):
        _, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        return sigma[:k], vt[:k]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(0)  # processes agree
        _, sigma, v = torch.svd_lowrank(x, q=k + _MORE, niter=_NITER)
    return sigma[:k], v.T[:k]
