"""Batches without end, and the training loop that every method shares."""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import in_mode

if TYPE_CHECKING:
    from pyro_blora.inference.resume import TrainingState

# batch -> loss with gradient, figures to show, on the loss's device
StepLoss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]

# Figures wait on the device for so many steps, or so many seconds: each reading stops the host.
_READ_EVERY, _SECONDS = 10, 1.0


@dataclass
class FitResult:
    """What a training run did.

    Attributes:
        history: for every step the figures shown on the progress bar.
        validation: for every validation its step and loss.
        best_step: the step of lowest validation loss, or ``None``.
        best_state: the trained tensors at that step, or ``None``.
        seconds: time of the training steps, without validation.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    best_state: dict[str, Tensor] | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        last = ", ".join(f"{k}={v:.4g}" for k, v in (self.history or [{}])[-1].items())
        best = "" if self.best_step is None else f", best validation at step {self.best_step}"
        return f"FitResult({len(self.history)} steps in {self.seconds:.0f} s: {last}{best})"


@contextmanager
def running(blora: BayesianLoRA, precision: str, *, training: bool) -> Iterator[None]:
    """Within, the network runs in this precision and mode, and Pyro checks no values."""
    mode = in_mode(blora.net, training=training)
    with blora.model.autocast(precision), mode, pyro.validation_enabled(False):
        yield


@contextmanager
def held_interrupts(held: bool = True) -> Iterator[list[int]]:
    """Within, the first Ctrl-C is only noted in the list, unless another handler was set."""
    noted: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    usual = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if held and usual:
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if held and usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def rate(step: int, num_steps: int, warmup: float, decay: str) -> float:
    """The learning rate at a step as a share of the full one; that of the first is not zero."""
    if step >= num_steps:  # the schedule of this group has ended
        return 0.0
    ramp = round(warmup * num_steps)
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, num_steps - ramp)
    if decay == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0


def schedule_length(group: Mapping[str, Any], num_steps: int, point_steps: int | None) -> int:
    """The steps after which a group of parameters has learned, earlier for what no KL sees."""
    if point_steps is None or group.get("name") not in ("direction", "head"):
        return num_steps
    return min(num_steps, point_steps)


def training_loop(
    loss_of: StepLoss,
    groups: list[dict[str, Any]],
    stream: Iterator[Batch],
    *,
    num_steps: int,
    check: Callable[[Batch, int, dict[str, float]], None],
    warmup: float = 0.06,
    decay: str = "linear",
    point_steps: int | None = None,
    max_grad_norm: float | None = 1.0,
    validate: Callable[[], float] | None = None,
    validate_every: int = 50,
    state: Callable[[], dict[str, Tensor]] = dict,
    keeper: "TrainingState | None" = None,
    save_every: int = 50,
    callback: Callable[[int], None] | None = None,
    progress: bool | None = None,
    description: str = "fit",
) -> FitResult:
    """Runs AdamW on the losses of a stream of batches; of a ``keeper`` the state is taken and kept.

    ``check`` sees the figures of each step once they are read, before anything is validated or
    saved. The gradient of a step whose loss is not finite counts as zero, so ``check`` can say why.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]
    result = FitResult()
    if keeper:
        keeper.load(optimizer, result)
    done = len(result.history)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    lengths = [schedule_length(group, num_steps, point_steps) for group in groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        [partial(rate, num_steps=n, warmup=warmup, decay=decay) for n in lengths],
        done - 1,
    )
    hide = None if progress is None else not progress
    told: dict[str, Any] = {"desc": description, "unit": "step", "disable": hide}
    bar = tqdm(range(done, num_steps), initial=done, total=num_steps, **told)
    waiting: list[tuple[Batch, dict[str, Tensor]]] = []
    read_at = time.perf_counter()

    def read() -> None:
        """Waits for the device, once for all the steps that were not read yet."""
        nonlocal read_at
        read_at = time.perf_counter()
        if not waiting:
            return
        rows = torch.stack([torch.stack(list(found.values())) for _, found in waiting]).tolist()
        for (batch, found), row in zip(waiting, rows, strict=True):
            figures = dict(zip(found, row, strict=True))
            check(batch, len(result.history), figures)
            result.history.append(figures)
        bar.set_postfix({name: f"{value:.3g}" for name, value in result.history[-1].items()})
        waiting.clear()

    with held_interrupts(keeper is not None) as interrupts:
        for step in bar:
            batch = next(stream)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss, figures = loss_of(batch)
            loss.backward()
            broken = ~loss.detach().isfinite()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(broken.to(parameter.device), 0.0)
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            schedule.step()
            waiting.append((batch, figures))
            done = step + 1
            validates = validate is not None and (done % validate_every == 0 or done == num_steps)
            late = len(waiting) == _READ_EVERY or time.perf_counter() - read_at > _SECONDS
            if late or validates or done == num_steps:
                read()
            result.seconds += time.perf_counter() - start
            if callback is not None:
                callback(done)
            if validate and validates:
                loss_now = validate()
                if all(loss_now < before for _, before in result.validation):
                    result.best_step, result.best_state = done, copy.deepcopy(state())
                result.validation.append((done, loss_now))
            if keeper and (done % save_every == 0 or done == num_steps or interrupts):
                read()
                keeper.save(optimizer, result)
            if interrupts:
                break
    if keeper and interrupts:
        raise KeyboardInterrupt(
            f"Stopped after step {done} of {num_steps}, which is saved in {keeper.folder}: the "
            "same call with resume=True goes on from there."
        )
    return result
