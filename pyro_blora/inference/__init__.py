"""Training and prediction loops."""

from pyro_blora.inference.finish import finish
from pyro_blora.inference.fit import fit
from pyro_blora.inference.inform import inform
from pyro_blora.inference.learning_rates import LEARNING_RATES, parameter_groups
from pyro_blora.inference.loop import FitOptions, FitResult, LoopOptions
from pyro_blora.inference.post_hoc import bayesianize

__all__ = [
    "LEARNING_RATES",
    "FitOptions",
    "FitResult",
    "LoopOptions",
    "bayesianize",
    "finish",
    "fit",
    "inform",
    "parameter_groups",
]
