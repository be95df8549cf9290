"""The options of ``fit``."""

import os
from dataclasses import dataclass

from pyro.infer import Trace_ELBO

from pyro_blora.errors import ConfigurationError
from pyro_blora.inference.loop import LoopOptions

__all__ = ["FitOptions"]


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
        lr_mean: learning rate of the guide's means. Default: the prior's own
            (``learning_rates``), in each group of layers, or else ``LEARNING_RATES``, 2e-2.
        lr_scale: that of scales, of the guide's and of the prior's. Default: likewise, 1e-2.
        lr_direction: that of the inducing directions. Default: likewise, 5e-3.
        lr_likelihood: that of a likelihood's own parameters. Default: likewise, 5e-2.
        lr_head: that of heads trained as points (``modules_to_save``). Default: likewise, 1e-3.
        direction_share: the share, in [0, 1), of the examples, drawn by the seed, from which
            directions, factors that are not random, and heads learn after ``split_after`` epochs,
            while all else learns from the others, whose mean log-likelihood stands for that of
            all. A step is of one or the other, and its ``nll`` too. Long trainings over-fit less
            (docs/calibration_tried.md). 0: everything learns from all. Needs examples, not a
            ``DataLoader``. Default: what suits the priors of all groups, 3/4 for
            ``KroneckerInducing`` with ``keep`` below 1 and 0 for others; 0 where the others would
            not fill a batch, no direction is trained, or with a ``DataLoader``.
        split_after: epochs of this call in which everything learns from all the same. Default: 6.
        kl_warmup: share of the steps in which the weight of the KL rises to ``kl_weight``.
            Default: 0.
        kl_weight: weight of the KL, :math:`w`, for any guide. Default: 1, the ELBO.
        validation_samples: posterior draws for a validation, the same random numbers every
            time and none of the training's; 0, the default, takes the posterior mean.
        keep_best: whether to go back to the best validation at the end. Default: no.
        cache_frozen_prefix: whether to keep, for each example, what the blocks below the lowest
            adapted layer put out, and to run them in the first epoch and the first validation
            alone. They, and the module that runs all blocks, are without dropout. Takes the memory
            of one hidden state for each token of the training set and of the validation set.
            Default: no.
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
    direction_share: float | None = None
    split_after: int | None = None
    kl_warmup: float = 0.0
    kl_weight: float = 1.0
    validation_samples: int = 0
    keep_best: bool = False
    cache_frozen_prefix: bool = False
    checkpoint_dir: str | os.PathLike[str] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= (self.direction_share or 0) < 1:
            raise ConfigurationError(
                f"direction_share={self.direction_share} must be a share in [0, 1)."
            )
        if (self.split_after or 0) < 0:
            raise ConfigurationError(f"split_after={self.split_after} must be epochs, 0 or more.")
        if self.resume and self.checkpoint_dir is None:
            raise ConfigurationError("resume=True needs checkpoint_dir=, the folder of the run.")
