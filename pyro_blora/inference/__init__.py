"""Training and prediction loops."""

from pyro_blora.inference.finish import finish
from pyro_blora.inference.fit import fit
from pyro_blora.inference.inform import inform
from pyro_blora.inference.learning_rates import optim_args, parameter_groups
from pyro_blora.inference.loop import FitOptions, FitResult, LoopOptions
from pyro_blora.inference.post_hoc import bayesianize

__all__ = [
    "FitOptions",
    "FitResult",
    "LoopOptions",
    "bayesianize",
    "finish",
    "fit",
    "inform",
    "optim_args",
    "parameter_groups",
]
