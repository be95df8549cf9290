"""What a prior says of options that cannot work."""

import pytest

from pyro_blora import models
from pyro_blora.errors import ConfigurationError

WRONG = [
    ("KroneckerInducing", {"conditional": "none"}, "conditional must be one of .*got 'none'"),
    ("KroneckerInducing", {"noise": "white"}, "noise must be one of .*got 'white'"),
    ("KroneckerInducing", {"scale": "none"}, "scale must be one of .*got 'none'"),
    ("KroneckerInducing", {"core": "horse"}, "core='horse' is unknown; .*horseshoe"),
    ("KroneckerInducing", {"sigma": 0.0}, "sigma must be positive.*got 0.0"),
    ("KroneckerInducing", {"sigma": float("nan")}, "sigma must be positive.*got nan"),
    ("KroneckerInducing", {"lambda_init": -1.0}, "lambda_init must be positive.*got -1.0"),
    ("KroneckerInducing", {"noise_init": float("inf")}, "noise_init must be .* finite, got inf"),
    ("KroneckerInducing", {"rank": 0}, "rank must be positive.*got 0"),
    ("KroneckerInducing", {"rank": (2, 0)}, r"rank must be positive.*got \(2, 0\)"),
    ("KernelInducing", {"row_kernel": "rbg"}, "kernel 'rbg' is unknown; .*rbf"),
    ("KernelInducing", {"embedding": "none"}, "embedding must be one of .*got 'none'"),
    ("KernelInducing", {"embedding_size": 0}, "must be positive"),
    ("KernelInducing", {"sigma": -1.0}, "must be positive"),
    ("KernelInducing", {"core": "cauchy"}, "core='cauchy' is unknown"),
    ("FactorInducing", {"inducing": 9}, "inducing=9 must be between 1 and rank=8"),
    ("FactorInducing", {"lambda_init": 0.5}, "lambda_init=0.5 must be between 0 and 0.03"),
    ("FactorInducing", {"conditional": "none"}, "conditional must be one of .*got 'none'"),
    ("FactorInducing", {"scale": "half-cauchy"}, "scale must be one of .*got 'half-cauchy'"),
    ("FactorInducing", {"sigma": 0.0}, "sigma must be .*got 0.0"),
    ("GaussianFactors", {"random": "C"}, "random must be one of .*got 'C'"),
    ("GaussianFactors", {"sigma": 0}, "must be positive"),
    ("Subspace", {"rank": 0}, "must be positive"),
    ("Hierarchical", {"spread": 0}, "spread must be positive.*got 0"),
    ("KroneckerInducing", {"core": "spike"}, r"core='spike' is unknown.*function shape"),
]


@pytest.mark.parametrize(("prior", "options", "match"), WRONG, ids=str)
def test_options_are_checked(prior, options, match):
    with pytest.raises(ConfigurationError, match=match):
        getattr(models, prior)(**options)
