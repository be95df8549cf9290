"""The training loop that every method shares, its settings, and its result."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.data.batches import shown
from pyro_blora.inference.objective import Objective
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import in_mode

# Reading a figure synchronizes the device, so figures are read after this many steps or seconds,
# unless a callback needs those of every step
_READ_EVERY, _SECONDS = 10, 1.0
# An adapter has not learned if accuracy exceeds confidence by this, after so many steps
_UNSURE, _FEWEST = 0.2, 20
_WARMUP, _MAX_GRAD_NORM = 0.06, 1.0  # a share of the steps, and of the loss per example


@dataclass
class FitResult:
    """The history of a training run."""

    history: list[dict[str, float]] = field(default_factory=list)  #: the figures of every step
    validation: list[tuple[int, float]] = field(default_factory=list)  #: steps and losses
    best_step: int | None = None  #: the step with the lowest validation loss, or ``None``
    best_state: dict[str, Tensor] | None = None  #: the trained tensors at that step, or ``None``
    num_held_out: int = 0  #: the number of examples that were held out for the temperatures
    seconds: float = 0.0  #: the time of the training steps, without loading and validation
    #: the arguments of :func:`~pyro_blora.fit` that the model card lists
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The accuracy on the training examples of the last tenth of the steps; NaN for text."""
        return self._late("acc")

    @property
    def confidence(self) -> float:
        """The mean probability of the chosen class, on the same examples and by the same draws."""
        return self._late("conf")

    @property
    def has_learned(self) -> bool:
        """False if it is far less sure of its training examples than right, after 20 steps."""
        return len(self.history) < _FEWEST or not self.accuracy - self.confidence > _UNSURE

    def _late(self, figure: str) -> float:
        late = [f[figure] for f in self.history[-(len(self.history) + 9) // 10 :] if figure in f]
        return sum(late) / len(late) if late else math.nan

    @property
    def stopped_early(self) -> bool:
        """Whether the validations ran out of ``patience`` before the last of ``num_steps``."""
        patience = self.settings.get("patience")
        if patience is None or len(self.history) >= self.settings["num_steps"]:
            return False
        return sum(step > (self.best_step or 0) for step, _ in self.validation) >= patience

    def __repr__(self) -> str:
        last = ", ".join(f"{k}={v:.4g}" for k, v in (self.history or [{}])[-1].items())
        best = "" if self.best_step is None else f", best validation at step {self.best_step}"
        early = ", stopped early" if self.stopped_early else ""
        return f"FitResult({len(self.history)} steps in {self.seconds:.0f} s{early}: {last}{best})"


@dataclass(frozen=True)
class Step:
    """What a ``callback`` of :func:`~pyro_blora.fit` receives after a step."""

    step: int  #: the number of steps done
    #: as in the history: ``loss`` and ``nll`` in nats per example, ``kl`` in nats in total, and
    #: with classes the batch's ``acc`` and ``conf``
    figures: Mapping[str, float]
    validation: float | None = None  #: the loss of the validation after this step, if any


Callback = Callable[[Step], object]


@contextmanager
def running(blora: BayesianLoRA, precision: str, *, training: bool) -> Iterator[None]:
    """Runs the network in this precision and mode within the context, without Pyro's validation."""
    mode = in_mode(blora.net, training=training)
    with blora.model.autocast(precision), mode, pyro.validation_enabled(False):
        yield


def rate(step: int, num_steps: int) -> float:
    """The learning rate at a step as a share of the full one; the first step's is not zero."""
    ramp = round(_WARMUP * num_steps)
    if step < ramp:
        return (step + 1) / ramp
    return max(0.0, 1 - (step - ramp) / max(1, num_steps - ramp))


def schedule_length(group: Mapping[str, Any], num_steps: int, point_steps: int | None) -> int:
    """The steps until a group's rate is zero: fewer for point estimates, which have no KL."""
    if point_steps is None or group.get("name") not in ("direction", "head"):
        return num_steps
    return min(num_steps, point_steps)


def training_loop(
    blora: BayesianLoRA,
    objective: Objective,
    groups: list[dict[str, Any]],
    stream: Iterator[Batch],
    settings: Mapping[str, Any],
    *,
    point_steps: int | None,
    validate: Callable[[], float] | None,
    callback: Callback | None,
    progress: bool | None,
) -> FitResult:
    """Runs AdamW on the losses of a stream of batches."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # the prior regularizes
    parameters = [p for group in groups for p in group["params"]]
    num_steps: int = settings["num_steps"]
    result = FitResult(settings=settings)
    lengths = [schedule_length(group, num_steps, point_steps) for group in groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [partial(rate, num_steps=n) for n in lengths]
    )
    bar = shown("fit", range(num_steps), progress)
    unread: list[tuple[Batch, dict[str, Tensor]]] = []
    read_at = time.perf_counter()

    def read_figures() -> None:
        """Reads the figures of all unread steps at once, which synchronizes the device."""
        nonlocal read_at
        read_at = time.perf_counter()
        if not unread:
            return
        rows = torch.stack([torch.stack(list(values.values())) for _, values in unread]).tolist()
        for (batch, values), row in zip(unread, rows, strict=True):
            figures = dict(zip(values, row, strict=True))
            objective.check(batch, len(result.history), figures)
            result.history.append(figures)
        bar.set_postfix({name: f"{value:.3g}" for name, value in result.history[-1].items()})
        unread.clear()

    for step in bar:
        if result.stopped_early:  # by the step before
            bar.set_description("fit stopped early")
            break
        batch = next(stream)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss, figures = objective(batch)
        loss.backward()
        # masked on the device, without reading it, so that the check sees finite parameters
        broken = ~loss.detach().isfinite()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(broken.to(parameter.device), 0.0)
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        unread.append((batch, figures))
        done = step + 1
        validation_due = done % settings["validate_every"] == 0 or done == num_steps
        late = len(unread) == _READ_EVERY or time.perf_counter() - read_at > _SECONDS
        if late or callback is not None or (validate and validation_due) or done == num_steps:
            read_figures()
        result.seconds += time.perf_counter() - start
        loss_now = None
        if validate and validation_due:
            loss_now = validate()
            # of a NaN, which compares as neither lower nor higher, nothing is the best
            earlier = [before for _, before in result.validation if math.isfinite(before)]
            if math.isfinite(loss_now) and loss_now < min(earlier, default=math.inf):
                result.best_step, result.best_state = done, copy.deepcopy(blora.state_dict())
            result.validation.append((done, loss_now))
        if callback is not None:
            callback(Step(done, result.history[-1], loss_now))
    return result
