"""Priors on LoRA's own factors: BLoB's model, ScalaBL's, and cores between singular directions."""

import pyro
import pytest
import tiny
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import Normal, kl_divergence
from transformers.pytorch_utils import Conv1D

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import FullRank, MeanField
from pyro_blora.models import GaussianFactors, SpectralInducing, Subspace
from pyro_blora.network.targets import group_layers, top_singular

N = 2


def bind(prior, make=lambda: nn.Linear(5, 4)):
    layers = {f"{i}.q": make() for i in range(N)}
    return prior.bind(group_layers(layers)[0])


def test_blob_s_forward():
    """BLoB: ``W0 x + alpha/r B (M x + [(E * Omega)(x * s)] * r)`` with one ``E`` and signs s, r.

    An example's own draw of A is ``M + E * Omega * (r s^T)``, which is what the layer applies.
    """
    prior = bind(GaussianFactors(rank=3, random="A", alpha=6.0))
    prior.B = torch.randn(N, 4, 3)
    M, Omega, E = torch.randn(N, 3, 5), torch.rand(N, 3, 5), torch.randn(N, 3, 5)
    examples = 6
    s, r = (torch.randint(0, 2, (examples, d)) * 2.0 - 1 for d in (5, 3))
    x = torch.randn(examples, 5)
    draws = M + E * Omega * (r[:, None, :, None] * s[:, None, None, :])  # P x n x r x d_in
    update = pyro.poutine.condition(prior, data={prior.site("A"): draws})()
    for layer, applied in enumerate(update.layers()):
        found = applied(x, torch.zeros(examples, 4))
        noise = ((x * s) @ (E * Omega)[layer].mT) * r
        expected = 2.0 * (x @ M[layer].mT + noise) @ prior.B[layer].mT
        torch.testing.assert_close(found, expected)


def test_blob_s_kl():
    """``sum [log(beta / Omega) + (Omega^2 + M^2) / (2 beta^2) - 1/2]``, of A alone."""
    beta = 0.2
    prior, family = GaussianFactors(rank=2, sigma=beta), MeanField(init_scale=0.3)
    blora = tiny.adapted(prior=prior, guide=family)
    expected = 0.0
    for q in blora.guide.families().values():
        M, Omega = q.loc.detach(), q.scale.detach()
        terms = (beta / Omega).log() + (Omega.square() + M.square()) / (2 * beta**2) - 0.5
        expected += terms.sum()
    torch.testing.assert_close(blora.kl(), expected)
    assert {n.rsplit("_", 1)[-1] for n in blora.guide._modules} == {"A"}


@pytest.mark.parametrize("random", ["A", "B", "both"])
def test_what_is_random_is_a_site_and_the_rest_is_trained(random):
    blora = tiny.adapted(prior=GaussianFactors(rank=2, random=random))
    sites = set(blora.guide.families())
    expected = {f"{g}.{f}" for g in ("q_proj", "v_proj") for f in "AB" if random in (f, "both")}
    assert sites == expected
    trained = {n.removesuffix("_unconstrained") for n, _ in blora.model.named_parameters()}
    rest = {f"{g}.{f}" for g in ("q_proj", "v_proj") for f in "AB"} - expected
    assert trained == rest


def test_a_starts_as_lora_s():
    blora = tiny.adapted(prior=GaussianFactors(rank=2, random="both"), guide=MeanField())
    A = blora.guide.families()["q_proj.A"].loc
    assert A.abs().max() <= 16**-0.5
    assert A.std().item() == pytest.approx((3 * 16) ** -0.5, rel=0.3)
    assert not blora.guide.families()["q_proj.B"].loc.any()


@pytest.mark.parametrize("family", [MeanField(), FullRank()], ids=repr)
def test_the_subspace_s_kl_has_the_right_direction(family):
    """KL[q || p], as TraceMeanField_ELBO takes it, not KL[p || q] as in a public implementation."""
    blora = tiny.adapted(prior=Subspace(rank=3, sigma=0.5), guide=family, num_data=4)
    forward, reverse = torch.zeros(()), torch.zeros(())
    for q in blora.guide.families().values():
        mean, sd = q.loc.detach(), q.distribution().variance.detach().sqrt()
        forward = forward + kl_divergence(Normal(mean, sd), Normal(0.0, 0.5)).sum()
        reverse = reverse + kl_divergence(Normal(torch.zeros(3), 0.5), Normal(mean, sd)).sum()
    torch.testing.assert_close(blora.kl(), forward)
    assert not torch.isclose(blora.kl(), reverse, rtol=0.1)
    batch = tiny.sequences()
    elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    loss, nll = tiny.scored(elbo.loss, blora.model, blora.guide, batch)
    assert loss == pytest.approx(4 * nll.item() + forward.item(), rel=1e-4)


def test_a_subspace_is_a_diagonal_core():
    prior = bind(Subspace(rank=3))
    prior.B = torch.randn(N, 4, 3)
    s = torch.randn(N, 3)
    update = pyro.poutine.condition(prior, data={prior.site("s"): s})()
    for i, layer in enumerate(update.layers()):
        expected = sum(s[i, k] * torch.outer(prior.B[i, :, k], prior.A[i, k]) for k in range(3))
        torch.testing.assert_close(layer.weight(), expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 4), lambda: Conv1D(4, 5)])
def test_singular_directions_are_those_of_the_weight(make):
    layers = {f"{i}.q": make() for i in range(N)}
    group = group_layers(layers)[0]
    left, right, values = top_singular(group, 2, 3)
    assert left.shape == (N, 2, 4)
    assert right.shape == (N, 3, 5)
    for i, layer in enumerate(layers.values()):
        W = layer.weight.detach()
        W = W.mT if isinstance(layer, Conv1D) else W
        for k in range(2):
            torch.testing.assert_close(left[i, k] @ W, values[i, k] * right[i, k])


def test_a_spectral_core_moves_the_weight_within_its_own_subspace():
    """``B = P``, ``A = R^T`` up to the scale that sigma has."""
    prior = bind(SpectralInducing(rank=2, sigma=0.5, scale="fixed"))
    V = torch.randn(N, 2, 2)
    update = pyro.poutine.condition(prior, data={prior.site("V"): V})()
    for i, (layer, module) in enumerate(zip(update.layers(), prior.group.modules, strict=True)):
        P, _, Rt = torch.linalg.svd(module.weight.detach())
        inside = P[:, :2].mT @ layer.weight() @ Rt[:2].mT
        signs = torch.sign((P[:, :2].mT @ prior.Z_r[i].mT).diagonal())
        signs_c = torch.sign((Rt[:2] @ prior.Z_c[i].mT).diagonal())
        expected = 0.5 * (signs[:, None] * signs_c) * V[i] / 1.01
        torch.testing.assert_close(inside, expected, atol=1e-5, rtol=1e-4)
        outside = layer.weight() - P[:, :2] @ inside @ Rt[:2]
        assert outside.abs().max() < 1e-6


def test_fixed_directions_leave_little_to_train():
    blora = tiny.adapted(prior=SpectralInducing(rank=4), guide=FullRank())
    assert sum(p.numel() for p in blora.model.parameters()) == 4  # sigma of the four layers


def test_a_quantized_weight_is_refused():
    layer = nn.Linear(5, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 5, dtype=torch.int8), requires_grad=False)
    group = group_layers({"a.q": layer})[0]
    with pytest.raises(ConfigurationError, match=r"a\.q has no weight of .* floats.*unquantized"):
        SpectralInducing(rank=2).bind(group)
    with pytest.raises(ConfigurationError, match="too large for group"):
        bind(GaussianFactors(rank=6))
