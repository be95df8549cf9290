"""Callbacks of ``fit`` that pass the figures of each step on to a logger."""

import os
from collections.abc import Callable

from pyro_blora.errors import ConfigurationError
from pyro_blora.inference.loop import Callback, Step


def logs_to(log: Callable[[dict[str, float], int], object]) -> Callback:
    """A callback of :func:`~pyro_blora.fit` that calls ``log(figures, step)`` after each step.

    Args:
        log: a function such as ``wandb.log``, ``accelerator.log`` or ``mlflow.log_metrics``. The
            figures are ``loss``, ``nll`` and ``kl``, and after a validation also ``validation``.

    Example::

        wandb.init(project="arc")
        fit(blora, train, collate=collate, num_steps=300, callback=logs_to(wandb.log))
    """

    def callback(step: Step) -> None:
        validation = {} if step.validation is None else {"validation": step.validation}
        log({**step.figures, **validation}, step.step)

    return callback


def tensorboard(folder: str | os.PathLike[str]) -> Callback:
    """A callback of :func:`~pyro_blora.fit` that writes the figures of each step for TensorBoard.

    Args:
        folder: the folder of the run, to pass to ``tensorboard --logdir``.

    Raises:
        ConfigurationError: TensorBoard is not installed.

    Example::

        fit(blora, train, collate=collate, num_steps=300, callback=tensorboard("runs/first"))
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        needed = "tensorboard() needs TensorBoard: pip install tensorboard."
        raise ConfigurationError(needed) from None
    writer = SummaryWriter(folder)

    def write(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # or the last two minutes are lost when the process ends

    return logs_to(write)
