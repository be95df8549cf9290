"""What a training step does besides running the network: counted, and timed.

The network's forward is left out: the likelihood's logits are one number, made of the sampled
factors, so that backward runs through the guide and the prior and stops there. What remains is the
guide, the prior, the ELBO, the hand-over of an update to every layer and the optimizer.
"""

import cProfile
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from ratios import ratio, take_turns
from setting import ANSWERS, adapted, batches, bayesian_step, network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.likelihoods import Batch, LabelTokens

__all__ = ["own_costs"]

ROWS = 8


class NoNetwork(LabelTokens):
    """Logits that cost nothing and have a gradient for every factor."""

    total: Tensor

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The same number for each class but the first, ``(B, C)``."""
        rows = torch.zeros(len(batch["labels"]), len(self.token_ids))
        rows[:, 1:] = 1.0
        return rows * self.total


class Operators(TorchDispatchMode):
    """Counts torch's operators, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def python_calls(run: Callable[[], Any]) -> int:
    """How many Python functions are called, in this thread."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


class PyroClock:
    """Seconds spent in Pyro's own functions, without what these call, while :meth:`timed` runs."""

    def __init__(self) -> None:
        self.profile = cProfile.Profile()
        self.folder = str(Path(pyro.__file__).parent)

    def timed(self, step: Callable[[], Any]) -> Callable[[int], Any]:
        """The step, watched."""
        return lambda _: self.profile.runcall(step)

    def __call__(self) -> float:
        """So far."""
        return sum(
            entry.inlinetime
            for entry in self.profile.getstats()
            if getattr(entry.code, "co_filename", "").startswith(self.folder)
        )


def _prepared(method: str, layers: int, rank: int) -> tuple[BayesianLoRA, Callable[[], Any]]:
    """An adapter on a network of so many layers, and its training step without the network."""
    likelihood = NoNetwork(token_ids=ANSWERS, num_data=1000)
    blora = adapted(network("least", layers).train(), method, likelihood, rank=rank)
    sampled = blora.model.updates

    def updates() -> Any:
        found = sampled()
        factors = [f for u in found.values() for f in (u.A, u.core, u.B) if f is not None]
        likelihood.total = torch.stack([f.mean() for f in factors]).sum()
        return found

    vars(blora.model)["updates"] = updates
    step = bayesian_step(blora, ROWS)
    (batch,) = batches(1, ROWS, 8)
    return blora, lambda: step(batch)


def own_costs(
    method: str, depths: Sequence[int], steps: int, rank: int = 1
) -> list[dict[str, Any]]:
    """Sites, torch operators, Python calls and processor seconds of a step without the network.

    The network is so narrow that arithmetic costs next to nothing: what is timed is Python. Steps
    of all depths take turns; a ratio is to the shallowest's step of the same turn. ``pyro`` has
    the same of Pyro's own time, which a profiler takes (and makes longer).
    """
    prepared = [_prepared(method, layers, rank) for layers in depths]
    rows = []
    (batch,) = batches(1, ROWS, 8)
    with pyro.validation_enabled(False):
        for layers, (blora, step) in zip(depths, prepared, strict=True):
            for _ in range(3):
                step()
            with Operators() as operators:
                step()
            parts = (blora.guide, blora.model)
            sites = sum(len(pyro.poutine.trace(part).get_trace(batch).nodes) for part in parts)
            row = {"layers": layers, "sites": sites, "operators": operators.count}
            rows.append(row | {"calls": python_calls(step)})
        by_depth = {str(layers): step for layers, (_, step) in zip(depths, prepared, strict=True)}
        runs = {layers: lambda _, step=step: step() for layers, step in by_depth.items()}
        seconds = list(take_turns(runs, steps, clock=time.process_time).values())
        clock = PyroClock()
        watched = {layers: clock.timed(step) for layers, step in by_depth.items()}
        in_pyro = list(take_turns(watched, steps, clock=clock).values())
    for row, own, pyros in zip(rows, seconds, in_pyro, strict=True):
        row |= {"seconds": statistics.median(own), **ratio(own, seconds[0])}
        row["pyro"] = {"seconds": statistics.median(pyros), **ratio(pyros, in_pyro[0])}
    return rows
