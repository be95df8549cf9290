"""What a prior says of options that cannot work."""

import pytest

from pyro_blora import models
from pyro_blora.errors import ConfigurationError

WRONG = [
    ("KroneckerInducing", {"conditional": "none"}, "conditional='none' is not one of"),
    ("KroneckerInducing", {"noise": "white"}, "noise='white' is not one of"),
    ("KroneckerInducing", {"scale": "none"}, "scale='none' is not one of"),
    ("KroneckerInducing", {"core": "horse"}, "core='horse' is unknown; .*horseshoe"),
    ("KroneckerInducing", {"sigma": 0.0}, "sigma=0.0 must be positive"),
    ("KroneckerInducing", {"sigma": float("nan")}, "sigma=nan must be positive"),
    ("KroneckerInducing", {"lambda_init": -1.0}, "lambda_init=-1.0 must be positive"),
    ("KroneckerInducing", {"noise_init": float("inf")}, "noise_init=inf must be .* finite"),
    ("KroneckerInducing", {"rank": 0}, "rank=0 must be positive"),
    ("KroneckerInducing", {"rank": (2, 0)}, r"rank=\(2, 0\) must be positive"),
    ("KernelInducing", {"row_kernel": "rbg"}, "kernel 'rbg' is unknown; .*rbf"),
    ("KernelInducing", {"embedding": "none"}, "embedding='none' is not one of"),
    ("KernelInducing", {"embedding_size": 0}, "must be positive"),
    ("KernelInducing", {"sigma": -1.0}, "must be positive"),
    ("KernelInducing", {"core": "cauchy"}, "core='cauchy' is unknown"),
    ("FactorInducing", {"inducing": 9}, "inducing=9 must be between 1 and rank=8"),
    ("FactorInducing", {"lambda_init": 0.5}, "lambda_init=0.5 must be between 0 and 0.03"),
    ("FactorInducing", {"conditional": "none"}, "conditional='none' is not one of"),
    ("FactorInducing", {"scale": "half-cauchy"}, "scale='half-cauchy' is not one of"),
    ("FactorInducing", {"sigma": 0.0}, "sigma=0.0"),
    ("GaussianFactors", {"random": "C"}, "random='C' is not one of"),
    ("GaussianFactors", {"sigma": 0}, "must be positive"),
    ("Subspace", {"rank": 0}, "must be positive"),
    ("Hierarchical", {"spread": 0}, "spread=0 must be positive"),
    ("KroneckerInducing", {"core": "spike"}, r"core='spike' is unknown.*function shape"),
]


@pytest.mark.parametrize(("prior", "options", "match"), WRONG, ids=str)
def test_options_are_checked(prior, options, match):
    with pytest.raises(ConfigurationError, match=match):
        getattr(models, prior)(**options)
