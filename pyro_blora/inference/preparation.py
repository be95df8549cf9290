"""What comes before the first step: data are read and checked, and the loss is made."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.data.batches import size_of
from pyro_blora.data.splits import hold_out
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Laplace
from pyro_blora.inference.learning_rates import rate_overrides
from pyro_blora.inference.objective import Objective
from pyro_blora.labels import has_places
from pyro_blora.likelihoods import Collate
from pyro_blora.posterior.guide import StructuredGuide, is_started, make_guide
from pyro_blora.posterior.store import read_store


@dataclass
class Preparation:
    """What a training starts from."""

    train: Any  # the examples, or a DataLoader, without those that are held out
    collate: Collate | None
    held_out: Any  # the examples that temperatures will be fitted to
    share: float  # of the examples that are held out
    validations: list[tuple[Any, Collate | None]]  # the examples and the collator of each set
    objective: Objective
    rates: Mapping[str, float]  # of this call by role


def prepare(
    blora: BayesianLoRA,
    train: Any,
    collate: Collate | None,
    validations: Sequence[Any] = (),
    *,
    learning_rates: float | Mapping[str, float] | None,
    held_out: float | None,
    num_particles: int | None,
    kl_weight: float = 1.0,
) -> Preparation:
    """Reads and checks all that a training is given; the arguments are those of ``fit``.

    What it sets in the likelihood, :class:`Snapshot` undoes if a later check fails. ``train`` may
    be ``None`` for a ``Trainer`` that only evaluates.
    """
    rates = rate_overrides(blora, learning_rates)
    every, collate_train, share = train, collate, 0.0
    if train is not None:
        every, collate_train = blora.reading(train, collate)  # first, as it may name the classes
        if validations:  # which cannot name them any more
            blora.likelihood.settle_classes(blora.net)
        share = _share(blora, every, held_out)
        size, likelihood = size_of(every), blora.likelihood
        likelihood.num_data = count = likelihood.num_data or size  # with those held out
        if count and size not in (None, count):
            warnings.warn(
                f"The likelihood has num_data={count}, but train has {size} examples, so the KL "
                f"weighs {size / count:.3g} times as much as in the ELBO; set likelihood.num_data.",
                stacklevel=4,  # fit, past the wrapper of one_at_a_time
            )
    others = [blora.reading(data, collate, training=False) for data in validations]
    kept, held = hold_out(every, share)
    objective = Objective(blora, num_particles, kl_weight, len(held))
    return Preparation(kept, collate_train, held, share, others, objective, rates)


def post_hoc_families(blora: BayesianLoRA) -> dict[str, Laplace]:
    """The ``Laplace`` guides, which find their width after training, by site."""
    guide = blora.guide
    if not isinstance(guide, StructuredGuide):
        return {}
    families = {name: f for name, f in guide.families().items() if isinstance(f, Laplace)}
    if families and not blora.likelihood.has_classes:
        raise ConfigurationError(
            f"{blora.method.guide!r} must have a likelihood with classes, got "
            f"{type(blora.likelihood).__name__}; pass another, or take a guide that is trained."
        )
    return families


def _share(blora: BayesianLoRA, train: Any, share: float | None) -> float:
    """The share of the training examples to calibrate with: as passed, or the default."""
    if share is not None and not 0 <= share < 1:
        raise ConfigurationError(f"held_out must be a share in [0, 1), got {share}.")
    sized = has_places(train) and not isinstance(train, DataLoader)
    method, likelihood = blora.method.held_out, blora.likelihood.held_out
    usual = likelihood if method is None else method
    if sized and blora.likelihood.has_temperature:
        return usual if share is None else share
    if share:
        raise ConfigurationError(
            f"held_out={share} must have rows and a likelihood with a temperature, got a "
            f"{type(train).__name__} and {type(blora.likelihood).__name__}; leave it out, and call "
            "blora.calibrate(rows) after training if the likelihood has tempered()."
        )
    if usual and share is None:
        warnings.warn(
            f"The scores of {type(blora.likelihood).__name__} need a temperature, but no examples "
            "can be held out of a DataLoader to fit it: pass the examples, or pass held_out=0.0 "
            "and call blora.calibrate(data, collate).",
            stacklevel=5,  # fit, past the wrapper of one_at_a_time
        )
    return 0.0


def begin_training(blora: BayesianLoRA) -> None:
    """Resets what an earlier training left behind: temperatures, and a post-hoc guide's width."""
    read_store(blora)
    for temperature in (blora.model.temperature, blora.model.mean_temperature):
        temperature.fill_(1)
    for family in post_hoc_families(blora).values():
        family.finished = False
    blora.likelihood.settle_classes(blora.net)


class Snapshot:
    """An adapter as it was before a call, to which an error of the call returns it."""

    def __init__(self, blora: BayesianLoRA) -> None:
        read_store(blora)
        self.blora, self.tokenizer = blora, blora.tokenizer
        self.started, likelihood = is_started(blora.guide), blora.likelihood
        self.settled = likelihood.options()  # some of which a training sets
        self.settled["by_numbers"] = likelihood.by_numbers
        self.tensors = {name: tensor.clone() for name, tensor in blora.state_dict().items()}

    @contextmanager
    def put_back_after(self, *errors: type[Exception]) -> Iterator[None]:
        """Puts everything back if the block raises one of these errors."""
        try:
            yield
        except errors:
            blora = self.blora
            blora.tokenizer = self.tokenizer
            if not self.started:  # an AutoGuide has parameters from its first call on
                guide = make_guide(blora.method.guide, blora.model)
                if type(blora.guide) is type(guide):  # one of the user's stays
                    blora.guide = guide
            blora.zero_grad()
            blora.load_state_dict(self.tensors, strict=False)  # as a user's guide may have grown
            for name, value in self.settled.items():
                setattr(blora.likelihood, name, value)
            raise


def draws_of_evaluation(blora: BayesianLoRA, num_samples: int | None) -> int | None:
    """The draws of a validation: 0 by default while a guide is a point, whose draws are equal."""
    points = any(not family.finished for family in post_hoc_families(blora).values())
    return 0 if num_samples is None and points else num_samples
