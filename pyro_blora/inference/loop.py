"""The training loop that every method shares: schedule, clipping, progress, validation, saving."""

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.network.precision import check_precision

__all__ = [
    "FitOptions",
    "FitResult",
    "Keeper",
    "LoopOptions",
    "batches_of",
    "by_length",
    "held_interrupts",
    "training_loop",
]

Collate = Callable[[list[Any]], Batch]
# (batch, step) -> loss with gradient, figures to show
StepLoss = Callable[[Batch, int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class LoopOptions:
    """How long and how to train.

    Attributes:
        num_steps: optimizer steps.
        batch_size: examples in a step; ignored where the data is a ``DataLoader``. Default: 8.
        warmup: share of the steps in which the learning rates rise from zero. Default: 0.06.
        decay: ``"linear"`` (the default) or ``"cosine"`` to zero after the warm-up, or
            ``"constant"``.
        max_grad_norm: the gradient's norm, per example, is clipped here; ``None`` does not clip.
            Default: 1.
        precision: ``"float32"``, ``"bfloat16"`` to run the frozen network under autocast, or
            ``"auto"``, the default: what is faster on the network's device, see
            :func:`~pyro_blora.network.precision.choose_precision`. The variational part stays in
            single precision.
        validate_every: steps between validations, where there is validation data. Default: 50.
        seed: seeds the order of the data and torch's global generator; ``None`` seeds neither. What
            the prior drew when the adapter was made came before: seed that yourself. Default: 0.
        progress: whether to show a progress bar; ``None``, the default, shows it on a terminal.
        callback: called after each step with the number of steps done. Default: nothing.
        save_every: steps between two savings of the run's state, where it is saved. Default: 50.

    Raises:
        ConfigurationError: an option is out of range.
    """

    num_steps: int
    batch_size: int = 8
    warmup: float = 0.06
    decay: str = "linear"
    max_grad_norm: float | None = 1.0
    precision: str = "auto"
    validate_every: int = 50
    seed: int | None = 0
    progress: bool | None = None
    callback: Callable[[int], None] | None = None
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.decay not in ("linear", "cosine", "constant"):
            raise ConfigurationError(f"decay={self.decay!r} is not linear, cosine or constant.")
        check_precision(self.precision)
        if not 0 <= self.warmup < 1:
            raise ConfigurationError(f"warmup={self.warmup} must be a share in [0, 1).")

    def rate(self, step: int) -> float:
        """The learning rate at a step as a share of the full one."""
        ramp = round(self.warmup * self.num_steps)
        if step < ramp:
            return (step + 1) / ramp
        progress = (step - ramp) / max(1, self.num_steps - ramp)
        if self.decay == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0


@dataclass(frozen=True)
class FitOptions(LoopOptions):
    """What :func:`fit` takes by name: these, and those of :class:`LoopOptions`.

    Attributes:
        num_particles: draws of the posterior for a batch; each sees its share of the examples. 1 is
            one draw for all; where it does not divide a (last) batch, the largest divisor below it
            is taken. Default: one for each example.
        elbo: the class of the ELBO, an average over particles, each of which sees its own examples.
            Bounds that combine particles otherwise (Renyi, tail-adaptive) need every particle to
            see every example. Default: ``TraceMeanField_ELBO``, whose KL is analytic where it can
            be, for a family of this library; ``Trace_ELBO`` for an AutoGuide and any other guide.
        lr_mean: learning rate of the guide's means. Default: the adapter's method's
            (``blora.method.learning_rates``).
        lr_scale: that of scales, of the guide's and of the prior's. Default: likewise.
        lr_direction: that of the inducing directions. Default: likewise.
        lr_likelihood: that of a likelihood's own parameters. Default: likewise.
        lr_head: that of heads trained as points (``modules_to_save``). Default: likewise.
        kl_weight: weight of the KL, :math:`w`, for any guide. Default: 1, the ELBO.
        keep_best: whether to go back to the best validation at the end. Default: no.
        checkpoint_dir: a folder of the run's own, where its state is saved, so that a run that was
            stopped or killed can go on. Ctrl-C then ends the step, and saves. Default: none.
        resume: whether to go on from the state in ``checkpoint_dir``, with the same bits on a CPU
            as if there had been no stop; where there is none, the run begins. With more
            ``num_steps`` a finished run goes on, too. Default: no.

    Raises:
        ConfigurationError: an option is out of range, or ``resume`` has no folder.
    """

    num_particles: int | None = None
    elbo: type[Trace_ELBO] | None = None
    lr_mean: float | None = None
    lr_scale: float | None = None
    lr_direction: float | None = None
    lr_likelihood: float | None = None
    lr_head: float | None = None
    kl_weight: float = 1.0
    keep_best: bool = False
    checkpoint_dir: str | os.PathLike[str] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.checkpoint_dir is None:
            raise ConfigurationError("resume=True needs checkpoint_dir=, the folder of the run.")


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


class Keeper(Protocol):
    """Where the state of a run is kept, such as a ``TrainingState``."""

    folder: Path

    def load(self, optimizer: torch.optim.Optimizer, result: FitResult) -> None:
        """Puts the state that is there, if one is, into these."""

    def save(self, optimizer: torch.optim.Optimizer, result: FitResult) -> None:
        """Keeps the state after a step."""


@contextmanager
def held_interrupts(held: bool = True) -> Iterator[list[int]]:
    """Within, the first Ctrl-C is noted in the list and does no more; a second one interrupts.

    If another handler than Python's own is set, and outside of the main thread, nothing changes.
    """
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


def by_length(
    data: Sequence[Any], length: Callable[[Any], int] | None, size: int
) -> list[list[int]]:
    """The indices of all examples, cut into batches of like lengths, or as they come."""
    order = list(range(len(data)))
    if length is not None:
        order.sort(key=lambda i: length(data[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches_of(
    data: Sequence[Any] | DataLoader[Any],
    collate: Collate | None,
    length: Callable[[Any], int] | None,
    size: int,
) -> Iterator[Batch]:
    """All examples in batches of like lengths; of a ``DataLoader`` its batches."""
    if isinstance(data, DataLoader):
        yield from data
        return
    assert collate is not None
    for cut in by_length(data, length, size):
        yield collate([data[i] for i in cut])


def training_loop(
    loss_of: StepLoss,
    groups: list[dict[str, Any]],
    stream: Iterator[Batch],
    options: LoopOptions,
    *,
    validate: Callable[[], float] | None,
    state: Callable[[], dict[str, Tensor]],
    keeper: Keeper | None = None,
    description: str = "fit",
) -> FitResult:
    """Runs AdamW on the losses of a stream of batches; of a ``keeper`` the state is taken and kept.

    Ctrl-C ends the step, with a keeper after it is saved.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]
    result = FitResult()
    if keeper:
        keeper.load(optimizer, result)
    done, last = len(result.history), options.num_steps
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, options.rate, last_epoch=done - 1)
    hide = None if options.progress is None else not options.progress
    bar = tqdm(
        range(done, last), desc=description, disable=hide, unit="step", initial=done, total=last
    )
    with held_interrupts(keeper is not None) as interrupts:
        for step in bar:
            batch = next(stream)
            start = time.perf_counter()
            optimizer.zero_grad()
            loss, figures = loss_of(batch, step)
            loss.backward()
            if options.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            schedule.step()
            elapsed = time.perf_counter() - start
            result.seconds += elapsed
            result.history.append(figures)
            shown = {name: f"{value:.3g}" for name, value in figures.items()}
            size = len(next(v for v in batch.values() if hasattr(v, "__len__")))
            bar.set_postfix({**shown, "ex/s": f"{size / elapsed:.1f}"})
            done = step + 1
            if options.callback is not None:
                options.callback(done)
            if validate and (done % options.validate_every == 0 or done == last):
                loss_now = validate()
                if all(loss_now < before for _, before in result.validation):
                    result.best_step, result.best_state = done, copy.deepcopy(state())
                result.validation.append((done, loss_now))
            if keeper and (done % options.save_every == 0 or done == last or interrupts):
                keeper.save(optimizer, result)
            if interrupts:
                break
    if keeper and interrupts:
        raise KeyboardInterrupt(
            f"Stopped after step {done} of {last}, which is saved in {keeper.folder}: the same "
            "call with resume=True goes on from there."
        )
    return result
