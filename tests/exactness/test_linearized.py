"""The one-pass predictive: exact where the network is linear in the core, else nearly so."""

import pytest
import tiny
import torch
from linear_gaussian import Toy
from pyro.infer.autoguide import AutoNormal

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import FullRank, MatrixNormal, MeanField
from pyro_blora.likelihoods import CausalLM
from pyro_blora.models import FactorInducing, Hierarchical, KroneckerInducing
from pyro_blora.posterior.linearized import linearized_logits, logit_jacobian


def test_the_jacobian_of_a_linear_network_is_its_design():
    toy = Toy(MatrixNormal(), ranks=(2, 3))
    logits, jacobian = logit_jacobian(toy.blora.model, toy.blora.guide, toy.batch)
    (J,) = jacobian.values()
    rows = toy.design.reshape(5, 3, 6)
    expected = rows - rows[:, :1]  # class 0 stands still
    torch.testing.assert_close(J.reshape(5, 3, 6), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), toy.blora.posterior(0) as net:
        torch.testing.assert_close(
            logits, net(toy.batch["x"]), atol=1e-5, rtol=1e-5, check_dtype=False
        )


def test_where_the_network_is_linear_it_is_exact():
    toy = Toy(FullRank(), ranks=(2, 3)).fit()
    draws = linearized_logits(toy.blora.model, toy.blora.guide, toy.batch, 100_000)
    mean, covariance = toy.moments()
    relative = draws - draws[..., :1]
    rows = toy.design.reshape(5, 3, 6) - toy.design.reshape(5, 3, 6)[:, :1]
    for b in range(5):
        exact = (rows[b] @ covariance @ rows[b].mT).detach()
        found = relative[:, b].mT.cov().double()
        torch.testing.assert_close(found, exact, atol=0.02 * float(exact.max()), rtol=0)
    base = toy.blora.net(toy.batch["x"]).detach()  # unadapted: the hooks add nothing now
    center = (base + (toy.design @ mean).reshape(5, 3)).detach()
    expected = center - center[:, :1]
    torch.testing.assert_close(relative.mean(0).double(), expected, atol=0.02, rtol=0)


PAIRS = [
    (KroneckerInducing(rank=2, sigma=0.3), MatrixNormal(init_scale=0.1)),
    (FactorInducing(rank=2), MeanField(init_scale=0.1)),
    (Hierarchical(rank=2), MeanField(init_scale=0.1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "family"), PAIRS, ids=repr)
def test_with_a_narrow_posterior_it_is_the_sampled_predictive(prior, family):
    blora, batch = tiny.adapted(prior=prior, guide=family), tiny.sequences(6)
    with torch.no_grad():
        for guide in blora.guide.families().values():
            guide.loc.add_(0.3 * torch.randn_like(guide.loc))
    torch.manual_seed(0)
    sampled = blora.predict(batch, 4000)
    linear = blora.predict(batch, 4000, linearized=True)
    mean = blora.predict(batch, 0).probs
    torch.testing.assert_close(linear.probs, sampled.probs, atol=3e-3, rtol=0)
    spread = sampled.samples.std(0)
    assert spread.max() > 1e-3
    torch.testing.assert_close(
        linear.samples.std(0), spread, atol=0.15 * float(spread.max()), rtol=0
    )
    assert (linear.probs - mean).abs().max() < 0.1


def test_the_network_runs_once():
    net = tiny.llama()
    blora, runs = tiny.probed(tiny.adapted(net)), []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    assert blora.predict(tiny.sequences(8), 500, linearized=True).samples.shape == (500, 8, 3)
    assert len(runs) == 1
    assert not any(p.grad is not None for p in blora.parameters())


def test_it_runs_under_inference_mode():
    blora, found = tiny.adapted(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(0)
            batch = tiny.sequences()
            found.append(blora.predict(batch, 3, linearized=True).samples.clone())
    assert torch.equal(*found)
    assert not found[0].requires_grad


REFUSED = [({}, 0), ({"guide": AutoNormal}, 5)]
REFUSED.append(({"prior": KroneckerInducing(rank=2, conditional="exact")}, 5))


@pytest.mark.parametrize(("options", "num_samples"), REFUSED)
def test_what_cannot_be_linearized_is_refused(options, num_samples):
    blora, batch = tiny.adapted(**options), tiny.sequences()
    blora.guide(batch)
    with pytest.raises(ConfigurationError, match="linear"):
        blora.predict(batch, num_samples, linearized=True)


def test_text_cannot_be_linearized():
    blora = tiny.adapted(likelihood=CausalLM(num_data=4))
    with pytest.raises(ConfigurationError, match="of CausalLM,"):
        linearized_logits(blora.model, blora.guide, tiny.texts(), 5)
