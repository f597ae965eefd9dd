"""LoRA Dropout as a Sparsity Regularizer for Overfitting Control. Lin et al., 2024. arXiv:2404.09610

    W' = W + s (diag(m_B) B) (A diag(m_A)),    B in R^{out x r},  A in R^{r x in},  s = alpha / r

m_A in {0, 1}^in and m_B in {0, 1}^out drop whole columns of A and rows of B, each with probability p: 2p - p^2 of the
product. They are drawn once per forward pass, for the whole batch; the paper's loss, a mean over several draws for one
batch, is here the mean over the micro-batches of a step, each with a draw of its own. There is no 1 / (1 - p).

At test time the masks stand at their mean, W' = W + (1 - p)^2 s B A, which merges; the paper's ensemble averages the
outputs of several masked models instead: see `LoRADropout.instances`. A is Kaiming-uniform and B zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.core import Adapter, Base, DeltatuneError, Method, Site
from deltatune.inits.seeded import place, uniform
from deltatune.methods.lora import LowRank


@dataclass(frozen=True, kw_only=True)
class LoRADropout(Method):
    """`seed`: of the masks of `instances`; those in training are torch's."""

    lr: ClassVar[float] = 3e-3
    r: int = 8
    alpha: float = 16.0
    p: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise DeltatuneError(f"LoRADropout: r must be at least 1, got {self.r}")
        if not 0 <= self.p < 1:
            raise DeltatuneError(f"LoRADropout: p must lie in [0, 1), got {self.p}")

    def shared(self, sites: Sequence[Site]) -> Instance:
        return Instance()

    def build(self, site: Site, shared: nn.Module | None) -> Masked:
        assert isinstance(shared, Instance)
        return Masked(site, self, shared)

    @staticmethod
    def instances(adapter: Adapter, n: int = 4) -> Iterator[int]:
        """The test-time ensemble: in round i the adapter is masked model i, the same one whenever this is called.

        sum(model(**batch).logits for _ in LoRADropout.instances(adapter, 4)) / 4
        """
        found = [m for _, unit in adapter.units() for m in unit.modules() if isinstance(m, Instance)]
        if not found:
            raise DeltatuneError(f"LoRADropout: adapter {adapter.name!r} has no masks: {type(adapter.method).__name__}")
        try:
            for i in range(n):
                for instance in found:
                    instance.number = i
                yield i
        finally:
            for instance in found:
                instance.number = None


class Instance(nn.Module):
    """Which model of the ensemble all sites are; None: fresh masks in training, their mean in evaluation."""

    number: int | None = None


class Masked(LowRank):
    def __init__(self, site: Site, method: LoRADropout, instance: Instance) -> None:
        super().__init__(site, method.r, method.alpha / method.r, method.p)
        self.keep_rate, self.key, self.instance = 1 - method.p, f"lora dropout/{method.seed}/{place(site)}", instance

    def product(self) -> tuple[Tensor, Tensor]:
        up, down = super().product()
        return self.keep_rate * up, self.keep_rate * down

    def masked(self) -> tuple[Tensor, Tensor]:
        up, down = super().product()
        return self.mask("B", up[:, :1]) * up, self.mask("A", down[:1]) * down

    def mask(self, factor: str, like: Tensor) -> Tensor:
        if self.instance.number is None:  # torch's dropout divides by 1 - p, in training only
            return self.keep_rate * self.dropout(like.new_ones(like.shape))
        drawn = uniform(f"{self.key}/{self.instance.number}/{factor}", like.numel(), like.device)
        return (drawn < self.keep_rate).to(like.dtype).view(like.shape)

    def forward(self, call: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        base, (up, down) = self.outer(call), self.masked()
        y = base.plus(x, up, down)
        return base.op(base.weight + up @ down, x, *args, **kwargs) if y is None else y
