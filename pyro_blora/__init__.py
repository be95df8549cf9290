"""Bayesian low-rank adapters for language models, as Pyro models with Kronecker inducing variables.

A :class:`BayesianLoRA` has three parts, each of which is swapped by passing another object: a prior
(``pyro_blora.models``), a guide (``pyro_blora.guides``) and a likelihood
(``pyro_blora.likelihoods``).
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pyro_blora._version import __version__

if TYPE_CHECKING:
    from pyro_blora import guides, likelihoods, models
    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.data import load_task
    from pyro_blora.evaluation.comparison import Comparison, compare
    from pyro_blora.evaluation.metrics import effective_ranks
    from pyro_blora.inference import bayesianize
    from pyro_blora.inference.fit import fit  # mypy takes inference.fit for the module
    from pyro_blora.network.pretrained import load_pretrained
    from pyro_blora.prediction import Prediction

__all__ = [
    "BayesianLoRA",
    "Comparison",
    "Prediction",
    "__version__",
    "bayesianize",
    "compare",
    "effective_ranks",
    "fit",
    "guides",
    "likelihoods",
    "load_pretrained",
    "load_task",
    "models",
    "predict_dataset",
]

_HOMES = {
    "BayesianLoRA": "bayesian_lora",
    "Comparison": "evaluation.comparison",
    "Prediction": "prediction",
    "bayesianize": "inference",
    "compare": "evaluation.comparison",
    "effective_ranks": "evaluation.metrics",
    "fit": "inference",
    "load_pretrained": "network.pretrained",
    "load_task": "data",
    "predict_dataset": "data.batches",
}


def __getattr__(name: str) -> Any:
    """Imports a name on first use (PEP 562), so that commands start without torch."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
