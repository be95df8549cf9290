"""Training and prediction loops."""

from pyro_blora.inference.fit import fit
from pyro_blora.inference.learning_rates import RATES, optim_args, parameter_groups
from pyro_blora.inference.loop import FitResult, Step
from pyro_blora.inference.post_hoc import bayesianize, finish

__all__ = [
    "RATES",
    "FitResult",
    "Step",
    "bayesianize",
    "finish",
    "fit",
    "optim_args",
    "parameter_groups",
]
