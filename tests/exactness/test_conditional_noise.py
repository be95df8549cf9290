"""p(W | U): the noise that layers see against the dense conditional covariance."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from choice_batches import batch_of
from dense_algebra import (
    D_IN,
    D_OUT,
    M_C,
    M_R,
    Dense,
    N,
    assert_covariance,
    assert_mean,
    bind,
    noise_covariance,
)
from torch.distributions import kl_divergence

from pyro_blora import guides
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.models import KroneckerInducing
from pyro_blora.posterior.bayesian_lora_model import repeat_batch
from pyro_blora.updates import (
    MarginalNoise,
    Side,
    conditional_kl,
    inducing_covariance,
    weight_noise,
    whiten,
)

RANK = (M_R, M_C)
DRAWS = 40_000


def make(conditional="scaled"):
    """A prior, its first layer's update and the dense algebra of that layer."""
    prior = bind(KroneckerInducing(rank=RANK, conditional=conditional, sigma=1.5, lambda_init=0.7))
    update = prior().layers()[0]
    lam = prior.lambda_[0] if conditional == "scaled" else 1.0
    with torch.no_grad():
        return prior, update, Dense(prior, 0, lam)


@torch.no_grad()
def draw(update, x):
    """The noise alone at inputs ``x`` (P x N x d_in)."""
    return update.noise(x, x @ update.A.mT, update.B)


def weights(prior, k=0, batch=()):
    """Draws of ``W - E[W | U]`` of layer ``k``, whose effect on outputs a layer's noise is."""
    sides = []
    for side in "rc":
        Z, D = getattr(prior, f"Z_{side}")[k], getattr(prior, f"D_{side}")[k]
        sides.append(Side.of(*whiten(Z, inducing_covariance(Z, D)), D))
    lam = prior.lambda_[k] if prior.conditional == "scaled" else 1.0
    return prior.layer_scale()[k] * lam * weight_noise(torch.Size(batch), *sides)


class OneWeight(KroneckerInducing):
    """The same noise, drawn as a whole weight for each particle."""

    def forward(self):
        update = super().forward()

        def noise_of(k):
            return lambda x, h, B: x @ weights(self, k, (len(x),)).mT

        return dataclasses.replace(update, noise=tuple(map(noise_of, range(self.group.n))))


def test_the_weight_s_covariance_is_exact(monkeypatch):
    prior, _, dense = make()
    with torch.no_grad():
        covariance = noise_covariance(monkeypatch, lambda: weights(prior))
        torch.testing.assert_close(covariance, dense.covariance())


@torch.no_grad()
@pytest.mark.parametrize("conditional", ["exact", "scaled"])
def test_marginal_variance_is_exact(conditional):
    _, update, dense = make(conditional)
    x = torch.randn(3, D_IN)
    variance = update.noise.variance(x[None], x[None] @ update.A.mT, update.B)
    expected = dense.output_covariance(x).diagonal().reshape(1, 3, D_OUT)
    torch.testing.assert_close(variance, expected)


@torch.no_grad()
def test_layer_adds_the_noise_to_the_mean():
    prior, _, dense = make()
    V, x = torch.randn(N, *RANK), torch.randn(2, D_IN)
    with pyro.plate("particles", DRAWS, dim=-2):
        core = {prior.site("V"): V.expand(DRAWS, N, *RANK)}
        update = pyro.poutine.condition(prior, data=core)().layers()[0]
    output = update(x.expand(DRAWS, 2, D_IN), torch.ones(DRAWS, 2, D_OUT)).flatten(1)
    mean = (1 + x @ dense.mean(V[0]).mT).flatten()
    assert_mean(output, mean)
    covariance = dense.output_covariance(x)
    assert_covariance(output - mean, covariance.diagonal().diag())


@torch.no_grad()
def test_marginal_prior_of_the_weight_is_isotropic(monkeypatch):
    """``Cov[E[dW | U]] + E[Cov[dW | U]] = sigma^2 I`` for U from its prior, exactly."""
    prior = bind(KroneckerInducing(rank=RANK, conditional="exact"))
    columns = []
    for k in range(M_R * M_C):
        V = torch.eye(M_R * M_C)[k].reshape(1, *RANK).expand(N, *RANK)
        update = pyro.poutine.condition(prior, data={prior.site("V"): V})().layers()[0]
        columns.append(update.weight().flatten())
    root = torch.stack(columns, -1)
    noise = noise_covariance(monkeypatch, lambda: weights(prior))
    sigma = prior.layer_scale()[0]
    assert (root @ root.mT).diagonal().max() > 0.01 * sigma**2
    torch.testing.assert_close(root @ root.mT + noise, sigma**2 * torch.eye(D_OUT * D_IN))


def test_gradients_of_the_variance():
    prior = bind(KroneckerInducing(rank=RANK, conditional="scaled"))
    x, G = torch.randn(1, 3, D_IN), torch.randn(1, 3, D_OUT)
    update = prior().layers()[0]
    parameters = list(prior.parameters())
    fast = (update.noise.variance(x, x @ update.A.mT, update.B) * G).sum()
    dense = Dense(prior, 0, prior.lambda_[0]).output_covariance(x[0]).diagonal()
    slow = (dense.reshape(1, 3, D_OUT) * G).sum()
    pairs = zip(*(torch.autograd.grad(f, parameters) for f in (fast, slow)), strict=True)
    assert len(parameters) == 6
    for a, b in pairs:
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_gradients_of_the_draws_are_those_of_the_plain_formula():
    x, h, B = (torch.randn(*s, requires_grad=True) for s in ((2, 3, D_IN), (2, 3, 2), (D_OUT, 2)))
    scale = torch.rand(2, requires_grad=True)
    noise = MarginalNoise(scale)
    weights = torch.randn(2, 3, D_OUT)
    grads = []
    for plain in (False, True):
        torch.manual_seed(0)
        if plain:
            drawn = noise.variance(x, 0.1 * h, B).sqrt() * torch.randn(2, 3, D_OUT)
        else:
            drawn = noise(x, 0.1 * h, B)
        grads.append((drawn.detach(), *torch.autograd.grad(drawn, (x, h, B, scale), weights)))
    torch.testing.assert_close(grads[0], grads[1])


def test_no_variance_gives_no_noise_and_no_gradient():
    x, h = torch.zeros(1, 2, D_IN, requires_grad=True), torch.ones(1, 2, 1)
    noise = MarginalNoise(torch.tensor(1.0))(x, h, torch.ones(D_OUT, 1))
    assert noise.eq(0).all()
    assert torch.autograd.grad(noise.sum(), x)[0].eq(0).all()


@pytest.mark.parametrize("lam", [0.1, 1.0, 1.7])
def test_conditional_kl_is_the_dense_one(lam):
    prior = bind(KroneckerInducing(rank=RANK))
    with torch.no_grad():
        q, p = (Dense(prior, 0, s).covariance() for s in (lam, 1.0))
    zero = torch.zeros(len(p))
    expected = kl_divergence(dist.MultivariateNormal(zero, q), dist.MultivariateNormal(zero, p))
    torch.testing.assert_close(conditional_kl(torch.tensor(lam), D_OUT, D_IN), expected)


@pytest.mark.parametrize("conditional", ["deterministic", "exact", "scaled"])
def test_conditional_kl_enters_the_elbo_once(conditional):
    prior = bind(KroneckerInducing(rank=RANK, conditional=conditional))
    trace = pyro.poutine.trace(prior).get_trace()
    rest = trace.log_prob_sum() - trace.log_prob_sum(lambda name, _: name.endswith(".V"))
    if conditional == "scaled":
        kl = sum(conditional_kl(lam, D_OUT, D_IN) for lam in prior.lambda_)
        torch.testing.assert_close(rest, -kl)
    else:
        assert rest == 0


def options_of_one_item(kind, pack):
    """Mean and covariance of the scores of two options behind one question."""
    prior = kind(rank=2, conditional="exact", sigma=0.2)
    guide = guides.MatrixNormal(init_scale=1e-3)
    torch.manual_seed(0)
    blora = tiny.adapted(tiny.llama(2), prior=prior, guide=guide, layers_to_transform=[0])
    batch = repeat_batch(batch_of([((3, 9, 4, 8, 2), [(5,), (6,)], 0)]), 100)
    draws = []
    for _ in range(40):
        with blora.model.applied(blora.posterior.draws(100)) as net:
            draws.append(MultipleChoice(pack=pack).logits(net, batch))
    return torch.cat(draws).mean(0), torch.cat(draws).T.cov()


@torch.no_grad()
def test_options_share_the_noise_of_their_question():
    """As under one weight, which needs no packing; independent noise, which does, is refused."""
    mean, covariance = options_of_one_item(OneWeight, False)
    deviation = covariance.diagonal().mean().sqrt()
    assert covariance[0, 1].abs() > 0.2 * deviation**2
    for kind in (OneWeight, KroneckerInducing):
        found = options_of_one_item(kind, None)
        assert (found[0] - mean).abs().max() < 0.1 * deviation
        assert (found[1] - covariance).abs().max() < 0.12 * deviation**2
    with pytest.raises(ConfigurationError, match="Conditional noise"):
        options_of_one_item(KroneckerInducing, False)
