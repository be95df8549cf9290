"""What every prior must do with every guide, in both training loops and both parameter stores.

The classes are read from ``__all__``, so a new one is held to the contract by being exported.
"""

import pickle

import pytest
import tiny
import torch
from own_classes import Plain, Spread

from pyro_blora import guides
from pyro_blora.guides import MeanField, SiteGuide
from pyro_blora.models import UpdateModel
from pyro_blora.testing import GuideContract, PairContract, PriorContract

PRIORS, FAMILIES = tiny.priors(), tiny.families()
NO_NORMAL_AT_THE_START = {"Flow", "LowRank", "Mixture"}

for prior in PRIORS:
    for family in FAMILIES:
        pair = {"prior": PRIORS[prior], "guide": FAMILIES[family]}
        tiny.contract(globals(), PairContract, prior + family, parts=pair)
# Each class by itself, and, since no pair of the library is to be checked twice, with one of
# the user's own.
for prior, made in PRIORS.items():
    tiny.contract(
        globals(), PriorContract, prior, make=made, parts={"prior": made, "guide": Spread()}
    )
for family, made in FAMILIES.items():
    tiny.contract(
        globals(),
        GuideContract,
        family,
        make=made,
        parts={"prior": Plain(), "guide": made},
        starts_at_prior=family not in NO_NORMAL_AT_THE_START,
    )


@pytest.mark.parametrize("family", [MeanField, guides.MatrixNormal, guides.FullRank])
def test_at_the_prior_the_kl_is_zero(family):
    """For every prior whose sites are normal and start at its mean; others have no closed form."""
    zero = set()
    for name, prior in PRIORS.items():
        kl = tiny.adapted(prior=prior, guide=family(init_scale=1.0)).kl()
        if kl is not None and abs(kl) < 1e-4:
            zero.add(name)
    assert {"KernelInducing", "KroneckerInducing", "SpectralInducing"} <= zero
    assert "GaussianFactors" not in zero  # A starts as LoRA does, away from the prior's mean


@pytest.mark.parametrize("prior", PRIORS)
def test_the_state_is_that_of_the_adapter_alone(prior):
    state = tiny.adapted(prior=PRIORS[prior]).model.state_dict()
    assert {name.split(".")[0] for name in state} == {"q_proj", "v_proj"}
    assert sum(tensor.numel() for tensor in state.values()) < 1500
    again = pickle.loads(pickle.dumps(state))
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_every_exported_class_is_covered():
    pairs = {name for name in globals() if name.startswith("Test")}
    assert len(pairs) == (len(PRIORS) + 1) * (len(FAMILIES) + 1) - 1


@pytest.mark.parametrize("contract", [UpdateModel, SiteGuide])
def test_an_incomplete_subclass_says_what_it_lacks(contract):
    class Half(contract):
        pass

    with pytest.raises(NotImplementedError, match=r"Half must define setup"):
        Half().setup(None)
    missing = Half().forward if contract is UpdateModel else Half().distribution
    with pytest.raises(NotImplementedError, match=r"Half must define (forward|distribution)"):
        missing()
