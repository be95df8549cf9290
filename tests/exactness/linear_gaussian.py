"""A linear network with Gaussian labels: the posterior of V is Gaussian and known."""

import pyro.distributions as dist
import torch
from own_classes import OfX
from torch import nn
from torch.distributions import kl_divergence

from pyro_blora import BayesianLoRA
from pyro_blora.distributions import Reshaped
from pyro_blora.models import KroneckerInducing

NOISE = 0.3
SIGMA = 1.5


class Observed(OfX):
    """``y = W x + noise``; a batch has ``x`` (B x d_in) and ``labels`` (B x d_out)."""

    def distribution(self, logits, labels):
        return dist.Normal(logits, NOISE).to_event(1)

    def check_labels(self, labels, logits):
        assert labels.shape == logits.shape


class Toy:
    """One layer of 3 x 6, its data, and the posterior, evidence and ELBO in closed form.

    Args:
        guide: what to adapt with.
        ranks: ``(m_r, m_c)``.
        rows: ``"general"`` directions Z_r, or ``"orthogonal"`` ones, for which Q_r Q_r^T is a
            multiple of the identity.
        inputs: ``"general"``, or ``"orthogonal"``, for which the inputs' second moment in the span
            of Q_c is a multiple of the identity.
    """

    def __init__(self, guide, ranks=(2, 3), rows="general", inputs="general"):
        m_r, m_c = ranks
        net = nn.Sequential(nn.Linear(6, 3))
        count = m_c if inputs == "orthogonal" else 5
        prior = KroneckerInducing(rank=ranks, sigma=SIGMA, scale="fixed", noise_init=0.4)
        likelihood = Observed(num_data=count)
        self.blora = BayesianLoRA(
            net, target_modules=["0"], prior=prior, guide=guide, likelihood=likelihood
        )
        (group,) = self.blora.model.groups
        self.prior = getattr(self.blora.model, group.name)
        self.q = getattr(self.blora.guide, self.prior.site("V").replace(".", "_"))
        if rows == "orthogonal":
            with torch.no_grad():
                self.prior.Z_r = torch.linalg.qr(torch.randn(3, m_r)).Q.mT[None]
        for parameter in self.blora.model.parameters():
            parameter.requires_grad_(False)  # the prior is given, the guide is trained

        update = self.prior()
        Q_r, Q_c = update.B[0].detach().mT, update.A[0].detach()
        x = torch.randn(count, 6)
        if inputs == "orthogonal":
            x = torch.linalg.pinv(Q_c).mT  # h = Q_c x are unit vectors
        h = x @ Q_c.mT
        # y_bi - (W0 x_b)_i = sum_kl B_ik h_bl V_kl, with B = sigma Q_r^T
        design = torch.einsum("ki,bl->bikl", SIGMA * Q_r, h).reshape(-1, m_r * m_c)
        V = torch.randn(m_r * m_c)
        residual = design @ V + NOISE * torch.randn(len(design))
        base = net(x).detach()
        self.batch = {"x": x, "labels": base + residual.reshape(base.shape)}
        self.design, self.residual = design, residual
        eye = torch.eye(m_r * m_c)
        self.precision = eye + design.mT @ design / NOISE**2
        mean = torch.linalg.solve(self.precision, design.mT @ residual / NOISE**2)
        self.posterior = dist.MultivariateNormal(mean, precision_matrix=self.precision)
        covariance = design @ design.mT + NOISE**2 * torch.eye(len(design))
        evidence = dist.MultivariateNormal(torch.zeros(len(design)), covariance)
        self.log_evidence = evidence.log_prob(residual)

    def moments(self):
        """Mean and covariance of the guide's q of row-major ``vec V``."""
        q = self.q.distribution()
        mean, size = q.mean.flatten(), q.event_shape.numel()
        covariance = torch.zeros(size, size)
        if isinstance(q, Reshaped):
            covariance = q.base_dist.covariance_matrix[0]
        elif hasattr(q, "covariance_matrix"):
            covariance = q.covariance_matrix[0]
        elif not isinstance(q, dist.Delta):
            covariance = q.variance.flatten().diag()
        return mean, covariance

    def elbo(self, kl_weight=1.0):
        """The ELBO of the guide with its expectation taken exactly, or with a weight of the KL."""
        mean, covariance = self.moments()
        error = (self.residual - self.design @ mean).square().sum()
        spread = (self.design @ covariance * self.design).sum()
        constant = dist.Normal(0.0, NOISE).log_prob(torch.tensor(0.0)) * len(self.residual)
        log_likelihood = constant - 0.5 * (error + spread) / NOISE**2
        prior = self.prior.normal(*self.q.site.shape[-2:]).expand([1])
        return log_likelihood - kl_weight * kl_divergence(self.q.distribution(), prior).sum()

    def fit(self, kl_weight=1.0):
        """The guide's best, by L-BFGS on the exact ELBO."""
        maximize(lambda: self.elbo(kl_weight), self.blora.guide.parameters())
        return self

    def assert_reached(self, tolerance, of_elbo):
        """The guide is the posterior, and its ELBO the log evidence."""
        mean, covariance = self.moments()
        given = {"rtol": 0, "atol": tolerance}
        torch.testing.assert_close(mean, self.posterior.mean, **given)
        torch.testing.assert_close(covariance, self.posterior.covariance_matrix, **given)
        torch.testing.assert_close(self.elbo(), self.log_evidence, rtol=0, atol=of_elbo)


def maximize(objective, parameters):
    """L-BFGS to the last digits."""
    options = {"tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, line_search_fn="strong_wolfe", **options
    )

    def closure():
        optimizer.zero_grad()
        loss = -objective()
        loss.backward()
        return loss

    optimizer.step(closure)


def divergence(toy):
    """KL from the guide to the posterior."""
    return kl_divergence(dist.MultivariateNormal(*toy.moments()), toy.posterior)
