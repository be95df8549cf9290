"""What a training step does is counted, not timed: it does not grow with the depth."""

from collections import Counter

import pyro
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_blora.guides import MeanField
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.models import KroneckerInducing


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def of(self, word):
        return sum(count for name, count in self.calls.items() if word in name)


class Weights(TorchDispatchMode):
    """Notes every tensor made with the shape of an adapted weight, either way up."""

    def __init__(self, net, shapes):
        super().__init__()
        self.base = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.shapes, self.made = {*shapes, *(s[::-1] for s in shapes)}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in filter(torch.is_tensor, tree_leaves(out)):
            new = value.untyped_storage().data_ptr() not in self.base
            if new and tuple(value.shape[-2:]) in self.shapes:
                self.made.append((func.overloadpacket.__name__, tuple(value.shape)))
        return out


NOISY = {name: KroneckerInducing(rank=2, conditional=name) for name in ("exact", "scaled")}
PRIORS = {**tiny.priors(), **NOISY}


@pytest.mark.parametrize("prior", PRIORS)
def test_no_tensor_has_the_shape_of_a_weight_but_the_weight(prior):
    # q_proj 40 x 40 and v_proj 20 x 40: sizes that nothing else has
    blora = tiny.adapted(tiny.llama(hidden_size=40), prior=PRIORS[prior], guide=MeanField())
    shapes = [tuple(m.weight.shape) for g in blora.model.groups for m in g.modules]
    batch = tiny.sequences(3)
    loss_of = tiny.elbo(3)(blora.model, blora.guide)
    with Weights(blora.net, shapes) as weights:
        loss_of(batch).backward()
        blora.predict(batch, 7)
        if prior not in NOISY:
            blora.predict(batch, 7, linearized=True)
    assert weights.made == []
    with weights:
        blora.posterior.draws(0)["q_proj"].layers()[0].weight()
    assert weights.made  # it would have been seen


def one_step(layers, **options):
    """Sites in a trace, and Choleskys in a training step forward and backward."""
    blora = tiny.adapted(tiny.llama(layers), **options)
    batch = tiny.sequences()
    sites = list(pyro.poutine.trace(blora.model).get_trace(batch).nodes)
    loss_of = tiny.elbo(4)(blora.model, blora.guide)
    assert blora.model.keeps_rows()  # found once, so not counted
    with Operators() as counter:
        loss_of(batch).backward()
    return sites, counter, blora


def test_besides_the_network_no_operator_is_added_by_depth(monkeypatch):
    """Nor are its modules searched in a step: Python would take longer than Pyro."""
    monkeypatch.setattr(LabelTokens, "logits", lambda *_: torch.zeros(4, len(tiny.ANSWERS)))
    (_, few, _), (_, many, large) = (one_step(n) for n in (2, 30))
    assert many.calls == few.calls
    large.net.modules = None
    large.guide(tiny.sequences())
    large.model(tiny.sequences())


# Covariance factors of the prior.
FACTORS = {"FactorInducing": 4, "GaussianFactors": 0, "Subspace": 0}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", tiny.families())
def test_sites_and_factorizations_do_not_grow_with_the_depth(prior, family):
    """One for each factor, in a group of thirty layers as in one of two; nothing is inverted."""
    pair = {"prior": PRIORS[prior], "guide": tiny.families()[family]}
    (shallow, few, small), (deep, many, large) = (one_step(n, **pair) for n in (2, 30))
    assert [g.n for g in large.model.groups] == [30, 30]
    assert deep == shallow
    assert many.of("cholesky") == few.of("cholesky")
    assert few.of("cholesky") <= FACTORS.get(prior, 2) * len(small.model.groups)
    assert many.of("inverse") == many.of("linalg_inv") == 0
    assert many.of("mm") > few.of("mm")  # the network itself did grow: the counter counts


def test_one_pass_for_all_particles_has_the_read_positions_in_the_head():
    net, batch = tiny.llama(), tiny.sequences(8)
    blora = tiny.probed(tiny.adapted(net))
    shapes, forward = [], net.lm_head.forward  # a hook would have it read all positions
    net.lm_head.forward = lambda x: shapes.append(x.shape[:-1].numel()) or forward(x)
    tiny.elbo(8)(blora.model, blora.guide)(batch)
    blora.predict(batch, 7)
    assert shapes == [8, 7 * 8]
    with torch.no_grad():
        net(batch["input_ids"])
    assert shapes[-1] == 8 * 7  # and afterwards it sees all of them again
