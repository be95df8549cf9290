"""What a training step does is counted, not timed: it does not grow with the depth."""

from pathlib import Path

import pyro
import pytest
import tiny
import torch
from pyro.infer import TraceMeanField_ELBO
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_blora.guides import MeanField
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.models import KroneckerInducing


class Counter(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def of(self, word):
        return sum(count for name, count in self.calls.items() if word in name)


class Weights(TorchDispatchMode):
    """Notes every tensor made with the shape of an adapted weight, either way up."""

    def __init__(self, net, shapes):
        super().__init__()
        self.base = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.shapes = {tuple(s) for s in shapes} | {tuple(s)[::-1] for s in shapes}
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(value, torch.Tensor) or tuple(value.shape[-2:]) not in self.shapes:
                continue
            if value.untyped_storage().data_ptr() not in self.base:
                self.made.append((func.overloadpacket.__name__, tuple(value.shape)))
        return out


NOISY = {
    conditional: KroneckerInducing(rank=2, conditional=conditional)
    for conditional in ("exact", "scaled")
}


@pytest.mark.parametrize("prior", {**tiny.priors(), **NOISY})
def test_no_tensor_has_the_shape_of_a_weight_but_the_weight(prior):
    """In a training step, in a prediction by draws and in one that is linearized."""
    # q_proj 40 x 40 and v_proj 20 x 40: sizes that nothing else has
    net, guide = tiny.llama(hidden_size=40), MeanField()
    blora = tiny.adapted(net, prior={**tiny.priors(), **NOISY}[prior], guide=guide)
    shapes = [m.weight.shape for g in blora.model.groups for m in g.modules]
    batch = tiny.sequences(3)
    elbo = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss_of = elbo(blora.model, blora.guide)
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
    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss_of = elbo(blora.model, blora.guide)
    with Counter() as counter:
        loss_of(batch).backward()
    return sites, counter, blora


def test_besides_the_network_no_operator_is_added_by_depth(monkeypatch):
    monkeypatch.setattr(LabelTokens, "logits", lambda *_: torch.zeros(4, len(tiny.ANSWERS)))
    (_, few, _), (_, many, large) = (one_step(n) for n in (2, 30))
    assert few.of("mm") > 0
    assert many.calls == few.calls
    # nor are the network's modules searched in a step: Python would take longer than Pyro
    large.net.modules = None
    large.guide(tiny.sequences())
    large.model(tiny.sequences())


# Covariance factors of the prior; a low-rank guide has one more, of its directions.
FACTORS = {"FactorInducing": 4, "GaussianFactors": 0, "Subspace": 0}
PRIORS = {**tiny.priors(), "scaled": KroneckerInducing(rank=2, conditional="scaled")}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", tiny.families())
def test_sites_and_factorizations_do_not_grow_with_the_depth(prior, family):
    """One for each factor, in a group of thirty layers as in one of two; nothing is inverted."""
    pair = {"prior": PRIORS[prior], "guide": tiny.families()[family]}
    (shallow, few, small), (deep, many, large) = (one_step(n, **pair) for n in (2, 30))
    assert [g.n for g in large.model.groups] == [30, 30]
    assert deep == shallow
    assert many.of("cholesky") == few.of("cholesky")
    sites = len(small.guide.families()) if family == "LowRank" else 0
    assert few.of("cholesky") <= FACTORS.get(prior, 2) * len(small.model.groups) + sites
    assert many.of("inverse") == many.of("linalg_inv") == 0
    assert many.of("mm") > few.of("mm")  # the network itself did grow: the counter counts


def test_one_pass_for_all_particles_has_the_positions_that_are_read_in_the_head():
    net, batch = tiny.llama(), tiny.sequences(8)
    blora = tiny.asked(tiny.adapted(net))
    shapes, forward = [], net.lm_head.forward

    def noted(hidden):
        shapes.append(hidden.shape[:-1].numel())
        return forward(hidden)

    net.lm_head.forward = noted
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    elbo(blora.model, blora.guide)(batch)
    blora.predict(batch, 7)
    assert shapes == [8, 7 * 8]
    with torch.no_grad():
        net(batch["input_ids"])
    assert shapes[-1] == 8 * 7  # and afterwards it sees all of them again


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.12", reason="fake tensors compare since torch 2.12")
def test_the_memory_of_fake_tensors_is_that_of_real_ones(monkeypatch):
    """And the step's is what the formula of docs/large_models.md says."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    from memory import NAMES, measure

    h, f, L, B, T = 256, 688, 8, 4, 128
    shape = dict(zip(NAMES, (h, f, L, 8, 2, 200, False), strict=True))
    with pyro.validation_enabled(False):
        real = measure(shape, B, T, draws=5)
        with FakeTensorMode(shape_env=ShapeEnv()):
            fake = measure(shape, B, T, draws=5)
    assert real == pytest.approx(fake, rel=0.02)
    formula = real["weights"] + real["16 n"] + B * T * L * (18 * h + 6 * f)
    assert real["step"] == pytest.approx(formula, rel=0.1)
