"""The loss that training minimizes: the negative ELBO of a batch, per example."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import (
    BatchError,
    ConfigurationError,
    NonFiniteLossError,
    check_count,
    check_positive,
)
from pyro_blora.likelihoods import Batch, Likelihood, SequenceClassification
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import StructuredGuide, analytic_kl, point_masses

_FIRST = 8  # steps, in which the rates have hardly begun to rise


class _ScaleOfKL(ScaleMessenger):
    """``poutine.scale`` on every site of model and guide but the labels, which it keeps."""

    labels: Any = None

    def _process_message(self, msg: Any) -> None:
        if msg["name"] == "labels":
            self.labels = msg
        else:
            super()._process_message(msg)


class Objective:
    """The loss of a batch per example; the arguments are those of :func:`~pyro_blora.fit`."""

    def __init__(
        self,
        blora: BayesianLoRA,
        num_particles: int | None = None,
        kl_weight: float = 1.0,
        num_held_out: int = 0,
    ) -> None:
        likelihood = blora.likelihood
        if likelihood.num_data is None:
            raise ConfigurationError(
                f"{type(likelihood).__name__} must know the size of the data set, got "
                "num_data=None; make it with num_data=len(train)."
            )
        if num_particles is not None:
            check_count("num_particles", num_particles)
        check_positive("kl_weight", kl_weight)
        kl_weight *= likelihood.num_data / max(1, likelihood.num_data - num_held_out)
        points = [q for q in point_masses(blora.guide) if isinstance(q, Delta)]
        dense = any(bool(q.log_density.any()) for q in points)  # which a closed form would ignore
        self._mean_field = isinstance(blora.guide, StructuredGuide) and not dense
        self.num_particles, self.kl_weight = num_particles, kl_weight
        self._blora = blora  # whose guide may be replaced by the user
        self._has_old_head = likelihood.new_head and bool(likelihood.trained_head)
        self._classes, self._first = 0, list[float]()  # of an old head; the first steps' NLLs

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of ``batch`` with its gradient, and the figures of a :class:`Step`.

        They stay on the device until the caller reads them and passes them to :meth:`check`.
        """
        model, guide = self._blora.model, self._blora.guide
        likelihood, num_data = model.likelihood, model.likelihood.num_data or 1
        if not model.enabled:
            raise ConfigurationError(
                "The adapter is off inside disable_adapter(), where only the KL would train it; "
                "train outside of it."
            )
        batch = model.prepared(batch)
        if batch.examples > num_data:  # the likelihood sees the share of a particle only
            raise BatchError(
                f"A batch of {batch.examples} examples is larger than the data set, "
                f"num_data={num_data}; pass num_data=len(train) to the likelihood."
            )
        # a user's own likelihood may take its labels from another key
        if batch.get("labels") is None and likelihood.labels(batch) is None:
            raise BatchError(
                "A batch must have labels to learn from, got none; add them, for a language model "
                "a copy of input_ids with -100 at the padding."
            )
        most = self.num_particles or (batch.examples if model.keeps_rows(batch) else 1)
        elbo = (TraceMeanField_ELBO if self._mean_field else Trace_ELBO)(
            # the largest divisor, because the last batch may be smaller
            num_particles=next(
                p for p in range(min(most, batch.examples), 0, -1) if batch.examples % p == 0
            ),
            max_plate_nesting=model.max_plate_nesting,
            vectorize_particles=True,
        )
        with _ScaleOfKL(self.kl_weight) as scale:  # mean NLL + kl_weight / N * KL
            loss = elbo.differentiable_loss(model, guide, batch) * (1 / num_data)
        if (site := scale.labels) is None:
            raise ConfigurationError(
                f"{type(likelihood).__name__} must observe a site called 'labels', by which "
                "the NLL is separated from the KL, got none; name it so in its observe()."
            )
        with torch.no_grad():
            nll = -site["fn"].log_prob(site["value"]).mean()  # without any scale
            kl = (loss - nll) * (num_data / self.kl_weight)  # the rest, without its weight
        figures = {"loss": loss.detach(), "nll": nll, "kl": kl}
        if likelihood.has_classes:
            logits = site["fn"].logits.detach()
            right = logits.argmax(-1) == site["value"]
            figures |= {"acc": right.float().mean(), "conf": logits.softmax(-1).amax(-1).mean()}
            if self._has_old_head:
                self._classes = int(logits.shape[-1])
        return loss, figures

    def check(self, batch: Batch, step: int, figures: Mapping[str, float]) -> None:
        """Raises an error if the figures of a step show that something is wrong, and says what."""
        if not math.isfinite(figures["loss"]):
            raise _explained(self._blora.model, self._blora.guide, batch, step)
        if len(self._first) < _FIRST and self._classes:
            self._first.append(figures["nll"])
            if len(self._first) == _FIRST:
                warn_above_chance(sum(self._first) / _FIRST, self._classes, self._blora.likelihood)
        size = self._blora.likelihood.num_data or 1
        rounding = 1e-3 * (1 + abs(figures["nll"]) * size / self.kl_weight)
        negative = self._mean_field and figures["kl"] < -rounding
        if negative and analytic_kl(self._blora.guide, self._blora.model) is not None:
            raise ConfigurationError(
                f"KL[q || p] must not be negative, got {figures['kl']:.4g} nats at step {step}: "
                "correct its closed form for your prior and guide, or run SVI with Trace_ELBO."
            )


def warn_above_chance(nll: float, num_classes: int, likelihood: Likelihood) -> None:
    """Warns if a LoRA of a classifier explains its training data clearly worse than a guess.

    One that has hardly learned is about as good, on a few batches sometimes a little worse.
    """
    if isinstance(likelihood, SequenceClassification) and nll > 1.1 * math.log(num_classes):
        names = list(likelihood.classes or range(num_classes))
        warnings.warn(
            f"The LoRA's NLL on the training data is {nll:.3g}, above that of a guess, "
            f"{math.log(num_classes):.3g}. Perhaps its classes have another order than {names}: "
            "pass likelihood=SequenceClassification(classes=[...]) in the order of its training.",
            stacklevel=7,
        )


def _explained(
    model: BayesianLoRAModel, guide: nn.Module, batch: Batch, step: int
) -> NonFiniteLossError:
    """The error for a NaN or infinite loss, which names the parameters or sites at fault."""
    bad = [
        name.removesuffix("_unconstrained")
        for name, parameter in nn.ModuleList([model, guide]).named_parameters()
        if not bool(parameter.isfinite().all())
    ]
    culprits = [f"the parameter {name[2:]}" for name in bad[:6]]
    if not culprits:
        batch = model.prepared(batch)
        with torch.no_grad(), pyro.validation_enabled(False):
            q = pyro.poutine.trace(guide).get_trace(batch)
            p = pyro.poutine.trace(pyro.poutine.replay(model, trace=q)).get_trace(batch)
        for label, trace in (("guide", q), ("model", p)):
            trace.compute_log_prob()
            for name in [*trace.stochastic_nodes, *trace.observation_nodes]:
                if not bool(trace.nodes[name]["log_prob_sum"].isfinite()):
                    culprits.append(f"the log-probability of {name} in the {label}")
    return NonFiniteLossError(
        f"The loss is not finite at step {step}; also not finite: {', '.join(culprits) or 'none'}. "
        "Lower the learning rates or the prior's sigma, or use precision='float32'."
    )
