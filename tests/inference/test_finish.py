"""Laplace, whose width is the curvature after training."""

import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import OfX
from torch import nn

from pyro_blora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Laplace, MeanField
from pyro_blora.guides.laplace import best_precision
from pyro_blora.inference import finish
from pyro_blora.models import GaussianFactors, KroneckerInducing


class Logistic:
    """Multinomial logistic regression in V: ``logits = W0 x + sigma Q_r^T V Q_c x``."""

    def __init__(self, guide, ranks=(2, 3)):
        options = {"guide": guide, "likelihood": OfX(num_data=7), "target_modules": ["0"]}
        options["prior"] = KroneckerInducing(rank=ranks, sigma=1.5, scale="fixed")
        self.blora = BayesianLoRA(nn.Sequential(nn.Linear(5, 4)), **options)
        (self.family,) = self.blora.guide.families().values()
        nn.init.normal_(self.family.loc)
        self.rows = [{"x": torch.randn(5), "label": torch.tensor(i % 4)} for i in range(7)]

    def collate(self, rows):
        both = torch.utils.data.default_collate(rows)
        return {"x": both["x"], "labels": both["label"]}

    def gauss_newton(self):
        """Dense ``sum_b J_b^T Lambda_b J_b`` over row-major ``vec V``."""
        batch = self.collate(self.rows)
        update = getattr(self.blora.model, self.blora.model.groups[0].name)()
        Q_r, Q_c = update.B[0].detach().mT, update.A[0].detach()
        J = 1.5 * torch.einsum("ki,bl->bikl", Q_r, batch["x"] @ Q_c.mT).flatten(-2)
        with torch.no_grad(), self.blora.posterior(0) as net:
            p = net(batch["x"]).softmax(-1)
        Lambda = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        return torch.einsum("bik,bij,bjl->kl", J, Lambda, J)


def test_diagonal_laplace_is_the_dense_one():
    toy = Logistic(Laplace(structure="diag"))
    H = toy.gauss_newton().diagonal()
    chosen = finish(toy.blora, toy.rows, collate=toy.collate, batch_size=3)
    (delta,) = chosen.values()
    assert delta == pytest.approx(best_precision(H, toy.family.loc))
    q = toy.family.distribution()
    torch.testing.assert_close(q.mean, toy.family.loc)
    torch.testing.assert_close(q.variance.flatten(), 1 / (H + delta))


@pytest.mark.parametrize("ranks", [(1, 3), (2, 1)])
def test_kronecker_laplace_is_the_dense_one_of_a_product(ranks):
    toy = Logistic(Laplace(), ranks=ranks)
    H = toy.gauss_newton()
    (delta,) = finish(toy.blora, toy.rows, collate=toy.collate).values()
    expected = torch.linalg.inv(H + delta * torch.eye(len(H)))
    q, V = toy.family.distribution(), torch.randn(5, 1, *ranks)
    exact = dist.MultivariateNormal(toy.family.loc.flatten(), expected)
    found = q.log_prob(V)[:, 0]
    torch.testing.assert_close(found, exact.log_prob(V.flatten(1)), rtol=1e-4, atol=1e-4)


def test_a_part_of_the_data_is_scaled_to_the_whole():
    toy = Logistic(Laplace(structure="diag"))
    widths = []
    for num_data, times in ((7, 1), (14, 1), (14, 2)):
        toy.blora.likelihood.num_data = num_data
        finish(toy.blora, toy.rows * times, collate=toy.collate)
        widths.append(toy.family.width.clone())
        toy.family.finished = False
    torch.testing.assert_close(widths[1], widths[2])
    assert not torch.allclose(widths[0], widths[1], rtol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_the_marginal_likelihood_is_highest_at_the_chosen_precision(scale):
    values = scale * torch.tensor([0.1, 3.0, 40.0, 700.0]).double()
    loc = torch.tensor([0.2, -1.0, 0.5, 2.0]).double() * scale**0.5

    def evidence(delta):
        logs = 4 * torch.tensor(delta).log() - (values + delta).log().sum()
        return 0.5 * (logs - delta * loc.square().sum())

    best = best_precision(values, loc)
    assert evidence(best) > max(evidence(best * 1.05), evidence(best / 1.05))
    for value, size, root in ((1e-6, 1.0, 1e-3), (0.0, 1.0, 1e-6), (1.0, 0.0, 1e6)):
        found = best_precision(torch.tensor([value]), torch.tensor([size]))
        assert found == pytest.approx(root, rel=1e-3)  # or an end of the range


def test_fit_finishes_and_the_width_travels():
    prior = GaussianFactors(rank=2, random="A", sigma=0.2)
    blora = tiny.adapted(prior=prior, guide=Laplace(), num_data=10)
    tiny.train(blora)
    batch = tiny.collate(tiny.examples(4))

    def width(blora):
        return blora.predict(batch, 20).mutual_information.mean()

    mean, state = blora.predict(batch, 0).samples, blora.state_dict()
    assert width(blora) > 0
    fresh = tiny.adapted(blora.unwrap(), prior=prior, guide=Laplace(), num_data=10)
    assert width(fresh).abs() < 1e-6  # still a point
    fresh.load_state_dict(state)
    assert torch.equal(fresh.predict(batch, 0).samples, mean)
    assert width(fresh) > 0
    tiny.train(fresh)  # and more training starts from the point again
    assert all(f.finished for f in fresh.guide.families().values())


def test_what_cannot_be_finished_is_refused():
    with pytest.raises(ConfigurationError, match="must have a Laplace guide"):
        finish(tiny.adapted(guide=MeanField()), tiny.examples(), collate=tiny.collate)
    with pytest.raises(ConfigurationError, match="got"):
        Laplace(structure="full")
