"""The moments of SVI beside those of NUTS, the second opinion."""

import pytest
from linear_gaussian import Toy
from pyro.infer import MCMC, NUTS

from pyro_blora.guides import FullRank


@pytest.mark.slow
def test_the_moments_of_svi_are_those_of_nuts():
    full = Toy(FullRank(), ranks=(1, 2)).fit()
    mcmc = MCMC(NUTS(full.blora.model), 300, warmup_steps=100, disable_progbar=True)
    mcmc.run(full.batch)
    ((name, samples),) = mcmc.get_samples().items()
    draws = samples.flatten(1)
    worth = mcmc.diagnostics()[name]["n_eff"].flatten().clamp(max=300)  # independent draws
    assert worth.min() > 80

    def sure(moments):
        """Which entries of mean and covariance NUTS does not tell from these, at 4 sigma."""
        mean, covariance = moments
        variance = covariance.diagonal()
        of_mean = (variance / worth).sqrt()
        products = variance[:, None] * variance + covariance.square()
        of_spread = (products / worth.min()).sqrt()
        return (
            (draws.mean(0) - mean).abs() <= 4 * of_mean,
            (draws.T.cov() - covariance).abs() <= 4 * of_spread,
        )

    mean, covariance = (moment.detach() for moment in full.moments())
    for moments in ((mean, covariance), (full.posterior.mean, full.posterior.covariance_matrix)):
        assert all(bool(entries.all()) for entries in sure(moments))
    # which tells something: half the width, or a mean one width away, is found out
    assert not sure((mean, covariance / 4))[1].diagonal().any()
    assert not sure((mean + covariance.diagonal().sqrt(), covariance))[0].any()
