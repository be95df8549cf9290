"""The loss that training minimises: the negative ELBO of a batch, per example."""

import math
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from torch import Tensor, nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.distributions.members import Members
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.inference.diagnosis import explain_non_finite
from pyro_blora.likelihoods import Batch
from pyro_blora.posterior.structured_guide import StructuredGuide, analytic_kl

__all__ = ["Objective"]


class Objective:
    """The loss of a batch per example.

    Args are those of :func:`~pyro_blora.fit`.

    Raises:
        ConfigurationError: an option is out of range, the likelihood lacks ``num_data``, or
            ``TraceMeanField_ELBO`` is asked of a guide that is none of this library, or that has a
            Delta with a density: it drops that density, by which an AutoGuide makes its sites.
    """

    def __init__(
        self,
        blora: BayesianLoRA,
        elbo: type[Trace_ELBO] | None,
        num_particles: int | None,
        num_steps: int = 1,
        kl_warmup: float = 0.0,
        kl_weight: float = 1.0,
    ) -> None:
        if blora.likelihood.num_data is None:
            raise ConfigurationError(
                f"{type(blora.likelihood).__name__} was not told the size of the data set; build "
                "it with num_data=len(train)."
            )
        if num_particles is not None and num_particles < 1:
            raise ConfigurationError(f"num_particles={num_particles} must be at least 1.")
        laws = _laws(blora.guide)
        points = [law for law in laws if isinstance(law, Delta | Members)]
        dense = any(isinstance(p, Delta) and bool(p.log_density.any()) for p in points)
        structured = isinstance(blora.guide, StructuredGuide) and not dense
        if elbo is None:
            elbo = TraceMeanField_ELBO if structured else Trace_ELBO
        if not issubclass(elbo, Trace_ELBO) or issubclass(elbo, TraceTailAdaptive_ELBO):
            raise ConfigurationError(
                f"elbo={elbo.__name__} does not average over particles, so they cannot share out "
                "the examples; use Trace_ELBO or TraceMeanField_ELBO."
            )
        analytic = issubclass(elbo, TraceMeanField_ELBO)
        if analytic and not structured:
            raise ConfigurationError(
                f"elbo={elbo.__name__} loses the density of the sites that "
                f"{type(blora.guide).__name__} makes of its draws; use Trace_ELBO, the default."
            )
        if not kl_weight > 0 or not 0 <= kl_warmup <= 1:
            raise ConfigurationError(
                f"kl_weight={kl_weight} must be positive and kl_warmup={kl_warmup} in [0, 1]."
            )
        self.blora, self.elbo, self.num_particles = blora, elbo, num_particles
        self.num_steps, self.kl_warmup, self.kl_weight = num_steps, kl_warmup, kl_weight
        self._analytic = False
        if analytic and not points:  # -log p of a point may be negative
            with pyro.validation_enabled(False):  # the first step explains what is not finite
                self._analytic = analytic_kl(blora.guide, blora.model) is not None

    def __call__(self, batch: Batch, step: int = 0) -> tuple[Tensor, dict[str, float]]:
        """The loss of ``batch`` with its gradient, and the figures ``loss``, ``nll`` and ``kl``.

        Raises:
            BatchError: the batch is larger than the data set, or has no labels.
            ConfigurationError: an analytic KL is negative.
            NonFiniteLossError: the loss is NaN or infinite; the message names the sites.
        """
        blora, count = self.blora, self.blora.likelihood.num_data or 1
        examples = blora.likelihood.examples(batch)
        if examples > count:
            raise BatchError(
                f"A batch of {examples} examples is larger than the data set, num_data={count}; "
                "pass num_data=len(train) to the likelihood."
            )
        if batch.get("labels") is None and blora.likelihood.labels(batch) is None:
            raise BatchError(
                f"The batch has no labels to learn from, only {', '.join(map(str, batch))}; add "
                "them, for a language model a copy of input_ids with -100 at the padding."
            )
        most = examples if self.num_particles is None else min(self.num_particles, examples)
        particles = next(p for p in range(most, 0, -1) if examples % p == 0)
        ramp = self.kl_warmup * self.num_steps
        weight = self.kl_weight * (1.0 if step >= ramp else (step + 1) / (ramp + 1))
        blora.model.kl_weight = weight
        nesting = blora.max_plate_nesting
        elbo = self.elbo(
            num_particles=particles, max_plate_nesting=nesting, vectorize_particles=True
        )
        with pyro.poutine.trace() as seen, pyro.poutine.block(expose=["labels"]):
            loss = elbo.differentiable_loss(blora.model, blora.guide, batch) * (weight / count)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise explain_non_finite(blora.model, blora.guide, batch, step)
        labels = seen.trace.nodes.get("labels")
        if labels is None:
            raise ConfigurationError(
                f"{type(blora.likelihood).__name__} observed no site called 'labels', of which the "
                "loss is told apart from the KL; name it so in its observe()."
            )
        with torch.no_grad():
            nll = -float(labels["fn"].log_prob(labels["value"]).mean())
        kl = (value - nll) * count / weight
        if self._analytic and kl < -1e-3 * (1 + abs(nll) * count / weight):  # beyond rounding
            raise ConfigurationError(
                f"KL[q || p] = {kl:.4g} nats at step {step}, and no KL is negative: the closed "
                "form registered for the laws of a prior and a guide of yours is wrong. Correct "
                "it, or pass elbo=Trace_ELBO, which needs none."
            )
        return loss, {"loss": value, "nll": nll, "kl": kl}


def _laws(guide: nn.Module) -> list[Any]:
    """Q of each site of a family of this library, without what makes dimensions an event."""
    laws: list[Any] = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for family in guide.families().values() if isinstance(guide, StructuredGuide) else ():
            law = family.distribution()
            while isinstance(law, torch.distributions.Independent):
                law = law.base_dist
            laws.append(law)
    return laws
