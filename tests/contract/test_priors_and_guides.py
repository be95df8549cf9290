"""What every prior must do with every guide, in both training loops and both parameter stores.

The classes are read from ``__all__``, so a new one is held to the contract by being exported.
"""

import copy
import pickle

import pyro
import pytest
import tiny
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam

from pyro_blora import guides, models
from pyro_blora.guides import MeanField, SiteGuide
from pyro_blora.inference import LEARNING_RATES
from pyro_blora.models import UpdateModel

PRIORS, FAMILIES = tiny.priors(), tiny.families()
STEPS = 3  # the directions have no gradient while the mean is zero, that is in the first step


@pytest.fixture(params=[f"{p}-{g}" for p in PRIORS for g in FAMILIES])
def pair(request):
    """A prior and a guide family."""
    prior, family = request.param.split("-")
    return PRIORS[prior], FAMILIES[family]


def svi_steps(blora, batch):
    """The loop of the quick start."""
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(blora.model, blora.guide, ClippedAdam({"lr": 5e-3}), elbo)
    for _ in range(STEPS):
        loss = svi.step(batch)
    return loss


def torch_steps(blora, batch):
    """The same with a torch optimizer; also checks the gradients."""
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
    loss_of = elbo(blora.model, blora.guide)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=5e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
    idle = [n for n, p in blora.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    return loss.item()


@pytest.mark.parametrize("steps", [svi_steps, torch_steps])
@pytest.mark.usefixtures("parameter_store")
def test_training_moves_every_parameter_and_the_predictions(pair, steps):
    prior, family = pair
    blora, batch = tiny.adapted(prior=prior, guide=family), tiny.sequences(8)
    start, before = tiny.trained(blora), blora.predict(batch, 0)
    loss = steps(blora, batch)
    assert loss == loss
    assert abs(loss) < float("inf")
    still = [n for n, value in tiny.trained(blora).items() if torch.equal(value, start[n])]
    assert not still
    assert not torch.equal(blora.predict(batch, 0).samples, before.samples)
    assert blora.predict(batch, 5).samples.shape == (5, 8, 3)


def test_the_loss_falls(pair):
    """Under the same draws before and after twenty steps of SVI."""
    prior, family = pair
    blora, batch = tiny.adapted(prior=prior, guide=family), tiny.sequences(8)
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)

    def loss():
        torch.manual_seed(0)
        return sum(elbo.loss(blora.model, blora.guide, batch) for _ in range(8)) / 8

    before = loss()
    svi = SVI(blora.model, blora.guide, ClippedAdam({"lr": 1e-2}), elbo)
    for _ in range(20):
        svi.step(batch)
    after = loss()
    assert abs(after) < float("inf")
    assert after < before


@pytest.mark.parametrize("family", [MeanField, guides.MatrixNormal, guides.FullRank])
def test_at_the_prior_the_kl_is_zero(family):
    """For every prior whose sites are normal and start at its mean; others have no closed form."""
    zero = set()
    for name, prior in PRIORS.items():
        pyro.clear_param_store()
        kl = tiny.adapted(prior=prior, guide=family(init_scale=1.0)).kl()
        if kl is not None and abs(kl) < 1e-4:
            zero.add(name)
    assert {"KernelInducing", "KroneckerInducing", "SpectralInducing"} <= zero
    assert "GaussianFactors" not in zero  # A starts as LoRA does, away from the prior's mean


def test_every_trainable_tensor_is_a_pyro_param_with_a_role(pair):
    prior, family = pair
    blora = tiny.adapted(prior=prior, guide=family)
    for module in blora.modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            assert isinstance(module, PyroModule)
            assert {n.removesuffix("_unconstrained") for n in own} == set(module._pyro_params)
            assert set(module._pyro_params) <= set(module.roles)
            assert {module.roles[n] for n in module._pyro_params} <= set(LEARNING_RATES)


def test_state_dict_travels(pair):
    """A trained adapter's tensors, copied and pickled, make a fresh one equal to it."""
    prior, family = pair
    net, batch = tiny.llama(), tiny.sequences(8)
    with pyro.settings.context(module_local_params=True):
        blora = tiny.adapted(net, prior=prior, guide=family)
        torch_steps(blora, batch)
        expected = blora.predict(batch, 0)
        model = pickle.loads(pickle.dumps(blora.model.state_dict()))
        guide = copy.deepcopy(blora.guide.state_dict())
        blora.unwrap()
        fresh = tiny.adapted(net, prior=prior, guide=family)
        assert not torch.equal(fresh.predict(batch, 0).samples, expected.samples)
        fresh.model.load_state_dict(model)
        fresh.guide.load_state_dict(guide)
        assert torch.equal(fresh.predict(batch, 0).samples, expected.samples)
    # the adapter alone: nothing of the network
    assert {name.split(".")[0] for name in model} == {"q_proj", "v_proj"}
    assert sum(tensor.numel() for tensor in model.values()) < 1500


def starts_at_zero(blora):
    """Priors with a trained ``B`` start it at zero, as LoRA does: every draw is then zero."""
    names = (".B", ".B_unconstrained")
    factors = [p for name, p in blora.model.named_parameters() if name.endswith(names)]
    return bool(factors) and not any(B.any() for B in factors)


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_the_mean_update_is_zero_at_the_start(name):
    net, batch = tiny.llama(), tiny.sequences()
    base = net(batch["input_ids"]).logits
    blora = tiny.adapted(net, prior=PRIORS[name], guide=MeanField())
    with blora.posterior(0) as adapted:
        torch.testing.assert_close(adapted(batch["input_ids"]).logits, base, atol=1e-6, rtol=0)
    if not starts_at_zero(blora):
        with blora.posterior(1) as adapted:
            assert not torch.allclose(adapted(batch["input_ids"]).logits, base, atol=1e-6)
    assert torch.equal(net(batch["input_ids"]).logits, base)


def test_a_bound_family_is_a_copy(pair):
    """One prior and one guide object serve any number of adapters."""
    prior, family = pair
    blora = tiny.adapted(prior=prior, guide=family)
    assert list(blora.parameters())
    assert not list(prior.parameters())
    assert not list(family.parameters())
    assert repr(prior) in repr(blora)
    assert repr(family) in repr(blora)


def test_repr_says_how_to_build_it_again(pair):
    for made, module in zip(pair, (models, guides), strict=True):
        again = type(made)(**made.options())
        assert repr(again) == repr(made)
        assert repr(made).startswith(f"{type(made).__name__}(")
        assert getattr(module, type(made).__name__) is type(made)


def test_every_exported_class_is_covered():
    for module, contract, covered in (
        (models, UpdateModel, PRIORS),
        (guides, SiteGuide, FAMILIES),
    ):
        classes = {n for n in module.__all__ if isinstance(getattr(module, n), type)}
        kinds = {n for n in classes if issubclass(getattr(module, n), contract)}
        assert kinds - {contract.__name__} == set(covered)
        assert len(covered) > 0


@pytest.mark.parametrize("contract", [UpdateModel, SiteGuide])
def test_an_incomplete_subclass_says_what_it_lacks(contract):
    class Half(contract):
        pass

    with pytest.raises(NotImplementedError, match=r"Half must define setup"):
        Half().setup(None)
    missing = Half().forward if contract is UpdateModel else Half().distribution
    with pytest.raises(NotImplementedError, match=r"Half must define (forward|distribution)"):
        missing()
