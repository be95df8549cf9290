"""What every prior and guide must do, and every pair of them in both loops and both stores.

The classes are read from ``__all__``, so a new one is held to the contract by being exported.
"""

import pyro
import pytest
import tiny
from own_classes import Plain, Spread
from waits import Waits

from pyro_blora.guides import MeanField
from pyro_blora.models import KernelInducing, KroneckerInducing
from pyro_blora.testing import GuideContract, PairContract, PriorContract

PRIORS, FAMILIES = tiny.priors(), tiny.families()
NO_NORMAL_AT_THE_START = {"Flow"}
# Roles and the fall of the loss do not depend on what a class is paired with
OF_ONE_CLASS = ("the_loss_falls", "every_parameter_is_a_pyro_param_with_a_role")
DEFAULT, SLOW = ("KroneckerInducing", "MatrixNormal"), pytest.mark.slow
LEFT_OUT = {f"test_{name}": None for name in OF_ONE_CLASS}
for prior in PRIORS:
    for family in FAMILIES:
        pair = {"prior": PRIORS[prior], "guide": FAMILIES[family]}
        marks = {} if prior == DEFAULT[0] or family == DEFAULT[1] else {"pytestmark": SLOW}
        tiny.contract(globals(), PairContract, prior + family, parts=pair, **LEFT_OUT, **marks)
# Each class by itself, with one of the user's own
for prior, made in PRIORS.items():
    parts = {"prior": made, "guide": Spread()}
    tiny.contract(globals(), PriorContract, prior, make=made, parts=parts)
for family, made in FAMILIES.items():
    parts = {"prior": Plain(), "guide": made}
    at_prior = {"starts_at_prior": family not in NO_NORMAL_AT_THE_START}
    tiny.contract(globals(), GuideContract, family, make=made, parts=parts, **at_prior)


NOISY = KroneckerInducing(rank=2, conditional="scaled")
DRAWN = [(prior, MeanField()) for prior in (*PRIORS.values(), NOISY)]
DRAWN += [(KroneckerInducing(rank=2), family) for family in FAMILIES.values()]


@pytest.mark.parametrize(("prior", "family"), DRAWN, ids=repr)
def test_no_draw_of_the_guide_or_the_prior_waits_for_the_host(prior, family):
    blora, batch = tiny.adapted(prior=prior, guide=family), tiny.sequences(4)
    draws = pyro.plate("draws", 4, dim=-1 - blora.max_plate_nesting)
    with pyro.validation_enabled(False), Waits() as waits, draws:
        q = pyro.poutine.trace(blora.guide).get_trace(batch)
        p = pyro.poutine.trace(pyro.poutine.replay(blora.model.updates, trace=q)).get_trace()
        q.compute_log_prob(), p.compute_log_prob()
    compared = isinstance(prior, KernelInducing)  # gpytorch compares the inputs of a kernel
    assert waits.count == (8 if compared else 0)
