"""Learning from teachers, one for each task: the first stage of Multitask Prompt Tuning (arXiv:2303.02861, sec. 3.2).

    L + lambda (L_logits + L_hidden)
    L_logits = KL(teacher || student) of the outputs,   L_hidden = MSE of the last hidden states

Rows name their tasks, `sources.squad`; the teacher of a task is the attached adapter of its name, `squad`, be it a
prompt or not, and is not trained. The outputs are those that carry loss, L_logits is their mean, L_hidden that of the
same positions, or of all tokens where a row has one output for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.callbacks.selection import at_rest
from deltatune.core import Callback, DeltatuneError, Events, Run, activate, detach, load, using


@dataclass(frozen=True, kw_only=True)
class Distillation(Callback):
    """`weight`: lambda; 0 for none, and then no teacher runs. `teachers`: folders of saved adapters, by task, which are
    on the model while it trains; without, they are there under their tasks' names."""

    weight: float = 1.0
    teachers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0 or (self.teachers and not self.weight):
            raise DeltatuneError(
                f"Distillation: weight must not be negative, nor zero beside teachers; got {self.weight}"
            )

    def start(self, run: Run) -> Events:
        return _Distilling(self.weight, self.teachers) if self.weight else Events()


class _Distilling(Events):
    """Asks the student for its hidden states, and listens to what it returns in training."""

    def __init__(self, weight: float, teachers: Mapping[str, str]) -> None:
        self.weight, self.teachers = weight, teachers
        self.heard: tuple[Mapping[str, Any], Any] | None = None  # what the student was given, and returned

    def on_train_start(self, run: Run) -> None:
        for task, folder in self.teachers.items():
            load(run.model, folder, task)
            run.exit.callback(detach, run.model, task)
        if self.teachers and run.adapter is not None:
            activate(run.model, run.adapter.name)
        asks = run.model.register_forward_pre_hook(self._ask, with_kwargs=True)
        hears = run.model.register_forward_hook(self._hear, with_kwargs=True)
        run.exit.callback(asks.remove)
        run.exit.callback(hears.remove)

    def _ask(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "output_hidden_states": True}) if model.training else None

    def _hear(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if model.training:
            self.heard = kwargs, output

    def on_loss(self, run: Run, loss: Tensor) -> Tensor:
        named = run.adapters or [None]
        if self.heard is None or run.targets is None or not all(n and "." in n for n in named):
            raise DeltatuneError(
                "Distillation: rows name no task to learn of a teacher; give the examples an adapter, as "
                f"'{run.adapter.name if run.adapter else 'sources'}.task', or leave it out"
            )
        (given, student), self.heard = self.heard, None
        states = _last(student)
        carries = (run.targets != -100).to(states.device)
        places = carries if carries.shape == states.shape[:2] else _tokens(given, states)
        kl, squares = [], []
        for name in dict.fromkeys(named):
            rows = torch.tensor([i for i, n in enumerate(named) if n == name], device=states.device)
            teacher = _taught(run.model, str(name).partition(".")[2], given, rows, len(states))
            out, here = carries[rows], places[rows]
            q, p = (x[out].float().log_softmax(-1) for x in (student.logits[rows], teacher.logits))
            kl.append(F.kl_div(q, p, reduction="sum", log_target=True))
            gap = states[rows][here].float() - _last(teacher)[here].float()
            squares.append(gap.square().mean(-1).sum())
        terms = torch.stack(kl).sum() / carries.sum() + torch.stack(squares).sum() / places.sum()
        return loss + self.weight * run.share * terms.to(loss.device)


@torch.no_grad()
def _taught(model: nn.Module, task: str, given: Mapping[str, Any], rows: Tensor, batch: int) -> Any:
    """What the teacher of `task` makes of some rows."""
    own = {k: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for k, v in given.items()}
    with at_rest(model), using(model, task):
        return model(**own)


def _last(output: Any) -> Tensor:
    states = output.get("decoder_hidden_states") or output.get("hidden_states")
    if not states:
        raise DeltatuneError(f"Distillation: {type(output).__name__} has no hidden states to learn from")
    return states[-1]  # type: ignore[no-any-return]


def _tokens(given: Mapping[str, Any], states: Tensor) -> Tensor:
    """(b, n): which places are tokens."""
    mask = given.get("attention_mask")
    return mask.bool() if mask is not None else torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
