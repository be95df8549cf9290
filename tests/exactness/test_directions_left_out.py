"""``keep``: draws of an update in which some directions are left out."""

import tiny
import torch

from pyro_blora import BayesianLoRA, recipes
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.models import KroneckerInducing
from pyro_blora.posterior.linearised import logit_jacobian
from pyro_blora.posterior.sample_updates import mean_updates, updates_at

KEEP, DRAWS = 0.6, 40_000


def test_mean_and_covariance_given_the_core_are_those_of_dense_algebra():
    torch.manual_seed(0)
    blora = tiny.adapted(prior=KroneckerInducing(rank=3, keep=KEEP))
    centre = blora.guide.center()
    values = {name: torch.randn_like(v).expand(DRAWS, *v.shape) for name, v in centre.items()}
    update = updates_at(blora.model, values, DRAWS)["q_proj"]
    A, B = update.A[0], update.B[0]
    core = blora.model.q_proj.layer_scale().detach()[0] * values["q_proj.V"][0, 0]
    W = update.layers()[0].weight()[:, :3, :3].flatten(1)
    # ab: entries of W. ij, kl: what one pair of directions, or another, gives to each of them
    parts = torch.einsum("oi,ij,jd->ijod", B[:3], core, A[:, :3]).flatten(2)
    together = 1 + (1 / KEEP - 1) * torch.eye(3)  # E[s_i s_k]
    second = torch.einsum("ik,jl,ija,klb->ab", together, together, parts, parts)
    products = W.unsqueeze(-1) * W.unsqueeze(-2)
    for found, expected in ((W, parts.sum((0, 1))), (products, second)):
        assert found.std(0).min() > 0
        assert ((found.mean(0) - expected).abs() < 5 * found.std(0) / DRAWS**0.5).all()


def test_the_mean_of_the_posterior_and_a_linearisation_have_them_all():
    found, batch = [], tiny.sequences()
    for keep in (KEEP, 1):
        torch.manual_seed(0)
        blora = tiny.adapted(prior=KroneckerInducing(rank=3, keep=keep), num_data=12)
        with torch.no_grad():
            for family in blora.guide.families().values():
                family.loc.add_(1)
        weight = mean_updates(blora.model, blora.guide)["v_proj"].layers()[0].weight()
        assert blora.predict(batch, 4, linearised=True).samples.shape == (4, 4, 3)
        logits, jacobian = logit_jacobian(blora.model, blora.guide, batch)
        found.append((weight, logits, jacobian["v_proj.V"]))
        blora.unwrap()
    assert found[0][0].abs().max() > 0
    torch.testing.assert_close(*found)


def test_what_the_default_leaves_out_and_how_wide_it_starts():
    likelihood, keeps = LabelTokens(token_ids=tiny.ANSWERS, num_data=12), []
    for parts in ({}, {"guide": MatrixNormal()}, {"prior": KroneckerInducing()}):
        blora = BayesianLoRA(tiny.llama(), likelihood=likelihood, **parts)
        keeps.append(blora.prior.keep)
        std = blora.guide.families()["q_proj.V"].distribution().variance.sqrt()
        torch.testing.assert_close(std, torch.full_like(std, 0.1))
    assert keeps == [0.9, 0.9, 1]
    for name, keep in (("bayesian-lora", 0.9), ("mean-field", 0.9), ("map", 1)):
        assert recipes.recipe(name).prior_of(None).keep == keep  # the mode leaves nothing out
