"""Bayesian low-rank adapters for language models, as Pyro models with Kronecker inducing variables.

Three nouns: a prior (``pyro_blora.models``), a guide (``pyro_blora.guides``) and a likelihood
(``pyro_blora.likelihoods``); each is swapped by passing another object to :class:`BayesianLoRA`.
"""

from pyro_blora import guides, likelihoods, models
from pyro_blora._version import __version__
from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.data import load_task
from pyro_blora.effective_rank import effective_ranks
from pyro_blora.inference import fit, predict_dataset
from pyro_blora.prediction import Prediction
from pyro_blora.pretrained import load_pretrained

__all__ = [
    "BayesianLoRA",
    "Prediction",
    "__version__",
    "effective_ranks",
    "fit",
    "guides",
    "likelihoods",
    "load_pretrained",
    "load_task",
    "models",
    "predict_dataset",
]
