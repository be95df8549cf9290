"""Training and prediction loops."""

from pyro_blora.inference.finish import finish
from pyro_blora.inference.fit import LEARNING_RATES, fit, parameter_groups
from pyro_blora.inference.fit_options import FitOptions
from pyro_blora.inference.inform import inform
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
