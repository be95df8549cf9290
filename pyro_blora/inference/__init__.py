"""Training and prediction loops."""

from pyro_blora.inference.finish import finish
from pyro_blora.inference.fit import FitOptions, fit
from pyro_blora.inference.inform import inform
from pyro_blora.inference.learning_rates import LEARNING_RATES, parameter_groups
from pyro_blora.inference.loop import FitResult, LoopOptions

__all__ = [
    "LEARNING_RATES",
    "FitOptions",
    "FitResult",
    "LoopOptions",
    "finish",
    "fit",
    "inform",
    "parameter_groups",
]
