"""Contracts for your own priors, guides and likelihoods, to subclass in a test file.

They are mixins of test methods on a tiny Llama, for pytest or with unittest's ``TestCase``::

    class TestMyPrior(PriorContract):
        def make(self):
            return MyPrior(rank=2)
"""

import copy
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from math import inf, isclose, isfinite, prod
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.distributions import Members
from pyro_blora.errors import BatchError
from pyro_blora.guides import Laplace, MeanField, Site, SiteGuide
from pyro_blora.inference import RATES
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.models import Hierarchical
from pyro_blora.posterior.posterior import is_linear

__all__ = ["GuideContract", "LikelihoodContract", "PairContract", "PriorContract"]

_PARAMS = "setup() must register learned tensors as PyroParams and other tensors as buffers"


class _Contract:
    noun: ClassVar[str]  # the option of BayesianLoRA that is checked

    def make(self) -> Any:
        """The object to check."""
        raise NotImplementedError(f"{type(self).__name__} must define make().")

    def parts(self) -> dict[str, Any]:
        """Options of :class:`~pyro_blora.BayesianLoRA` that replace the contract's defaults."""
        return {self.noun: self.make()}

    def net(self) -> nn.Module:
        """The network: a Llama, ``q_proj`` 16 x 16 and ``v_proj`` 8 x 16 in three blocks."""
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}
        sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()

    def batch(self, rows: int) -> dict[str, Any]:
        """A batch of right-padded rows of different lengths, each with one of three classes."""
        ids = torch.randint(8, 32, (rows, 7), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(7) < 7 - torch.arange(rows).unsqueeze(-1) % 4).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(rows) % 3}

    def adapted(self, net: nn.Module | None = None, **parts: Any) -> BayesianLoRA:
        """An adapter on ``net``, or on a new network with a fixed seed."""
        if net is None:
            pyro.set_rng_seed(0)
            net = self.net()
        likelihood = LabelTokens(token_ids=(5, 6, 7), num_data=12)
        usual = {"prior": Hierarchical(rank=2), "guide": MeanField(), "likelihood": likelihood}
        return BayesianLoRA(net, **{**usual, **self.parts(), **parts})

    def test_a_trained_adapter_survives_saving_and_loading(self) -> None:
        """A new adapter scores labels the same after loading the state dict or the saved folder."""
        batch, parts = self.batch(8), self.parts()
        with pyro.settings.context(module_local_params=True), tempfile.TemporaryDirectory() as path:
            blora = self.adapted(**parts)
            for part in parts.values():
                assert repr(part) in repr(blora), f"{part!r} is missing from {blora!r}."
            _train(blora, batch, svi=False)
            expected, state = blora.log_predictive(batch, 0), copy.deepcopy(blora.state_dict())
            blora.save_pretrained(path)
            fresh = self.adapted(blora.unwrap())
            assert not torch.equal(fresh.log_predictive(batch, 0), expected)
            fresh.load_state_dict(state)
            loaded, again = (fresh.log_predictive(batch, 0) for _ in range(2))
            read = BayesianLoRA.from_pretrained(fresh.unwrap(), path, **parts)
        assert torch.equal(again, loaded), "Two means differ; make noise only by pyro.sample."
        assert torch.equal(loaded, expected), f"load_state_dict does not restore it: {_PARAMS}."
        assert torch.equal(read.log_predictive(batch, 0), expected), (
            f"from_pretrained changes it: {_PARAMS}."
        )


class PairContract(_Contract):
    """The tests that any prior passes with any guide family; override ``parts()``."""

    def test_both_loops_train_every_parameter_in_both_stores(self) -> None:
        """SVI and ``ELBO()(model, guide)`` change every parameter, in both parameter stores."""
        for svi, local in product((True, False), (False, True)):
            with pyro.settings.context(module_local_params=local):
                blora, batch = self.adapted(), self.batch(8)
                start = {name: p.detach().clone() for name, p in blora.named_parameters()}
                before, loss = blora.predict(batch, 0).samples, _train(blora, batch, svi=svi)
                still = [n for n, p in blora.named_parameters() if torch.equal(p, start[n])]
                mean = blora.predict(batch, 0).samples
            assert -inf < loss < inf, f"The loss is {loss}."
            assert not still, f"module_local_params={local}: {still} do not change: {_PARAMS}."
            assert not torch.equal(mean, before), f"The predictions do not change: {_PARAMS}."

    def test_the_loss_falls(self) -> None:
        """Twenty steps of SVI lower the median loss of eight passes with the same random seed."""
        blora, batch, losses = self.adapted(), self.batch(8), []
        elbo = TraceMeanField_ELBO(8, blora.max_plate_nesting, vectorize_particles=True)
        for steps in (20, 1):
            torch.manual_seed(0)
            losses += [sorted(elbo.loss(blora.model, blora.guide, batch) for _ in range(8))[4]]
            _train(blora, batch, steps, svi=True)
        assert -inf < losses[1] < losses[0], f"The loss goes from {losses[0]} to {losses[1]}."

    def test_guide_and_particles_follow_the_model(self) -> None:
        """Model and guide have the same sites; no two particles share updates or rows."""
        blora, batch = self.adapted(), self.batch(8)
        with pyro.plate("num_particles_vectorized", 4, dim=-1 - blora.max_plate_nesting):
            q = poutine.trace(blora.guide).get_trace(batch)
            p = poutine.trace(poutine.replay(blora.model, trace=q)).get_trace(batch)
            updates = poutine.replay(blora.model.updates, trace=q)()
        assert _latents(q) == _latents(p), f"Guide: {_latents(q)}, model: {_latents(p)}."
        for name, center in blora.guide.center().items():
            ours, site = q.nodes[name], p.nodes[name]
            shape, wanted = ((s["fn"].event_shape, {*s["cond_indep_stack"]}) for s in (ours, site))
            assert shape == wanted, f"{name} is {shape} in the guide and {wanted} in the model."
            _check_support(name, site["fn"], site["value"], center)
        for name, update in updates.items():
            assert prod(update.particle_shape) == 4, f"{name}: {update.particle_shape} particles."
        assert p.nodes["labels"]["fn"].batch_shape[-1] == 2, "4 particles must share the 8 rows."

    def test_every_parameter_is_a_pyro_param_with_a_role(self) -> None:
        """Otherwise a parameter store misses it, or ``fit`` does not know its learning rate."""
        for part in self.parts().values():
            assert not list(part.parameters()), f"{part!r} has parameters before setup()."
        for module in self.adapted().modules():
            names = {
                n.removesuffix("_unconstrained") for n, _ in module.named_parameters("", False)
            }
            known = set(module._pyro_params) if isinstance(module, PyroModule) else set()
            assert names == known, f"{module!r}: make each of {names ^ known} a PyroParam."
            wrong = {name for name in names if module.roles.get(name) not in RATES}
            assert not wrong, f"{module!r}: roles must give {wrong} one of {list(RATES)}."


class PriorContract(PairContract):
    """The tests of a prior, by itself and with a mean-field guide; override ``make()``.

    Attributes:
        starts_at_zero: whether the mean update is zero before training, like LoRA's. Default:
            ``True``.
    """

    noun = "prior"
    starts_at_zero: ClassVar[bool] = True

    def test_sites_and_updates_have_their_shapes(self) -> None:
        """Layers are a plate, not an event; ``forward()`` samples all sites; factors fit layers."""
        blora = self.adapted()
        p = poutine.trace(blora.model.updates).get_trace()
        late = _latents(poutine.trace(blora.model).get_trace(self.batch(4)))[len(_latents(p)) :]
        assert not late, f"{late} are sampled in a layer; sample all sites in forward()."
        for name in _latents(p):
            shape, frames = p.nodes[name]["fn"].batch_shape, p.nodes[name]["cond_indep_stack"]
            free = {i for i in range(-len(shape), 0) if shape[i] > 1} - {f.dim for f in frames}
            assert not free, f"{name}: no plate has dimension {free}; sample it in self.plate()."
        for draws in (0, 1, 3):
            for group, update in blora.posterior.draws(draws).items():
                getattr(blora.model, group).check_update(update)
        alone = poutine.trace(self.adapted(layers_to_transform=0).model.updates).get_trace().nodes
        for name in _latents(p):
            event, one = (nodes[name]["fn"].event_shape for nodes in (p.nodes, alone))
            assert event == one, f"{name}: its layers are in its event; sample it in self.plate()."

    @torch.no_grad()
    def test_the_mean_update_is_zero_at_the_start(self) -> None:
        """The network is unchanged under the posterior mean, and changed under a draw."""
        blora, ids = self.adapted(), self.batch(4)["input_ids"]
        outside = blora.net(ids).logits
        with blora.posterior(0) as adapted:
            mean = adapted(ids).logits
        for factor in blora.model.parameters():  # a zero factor, like LoRA's B, hides draws
            factor.add_(0.1 * torch.randn_like(factor) * (not factor.any()))
        with blora.posterior(1) as adapted:
            draw = adapted(ids).logits
        zero = torch.allclose(mean, outside, atol=1e-6, rtol=0)
        assert zero or not self.starts_at_zero, "The mean is not zero; is starts_at_zero=False?"
        assert not torch.allclose(draw, mean, atol=1e-6), "The update ignores its sites."
        assert torch.equal(blora.unwrap()(ids).logits, outside), "unwrap() changes the network."

    @torch.no_grad()
    def test_the_mean_of_the_factors_is_that_of_the_update(self) -> None:
        """A site is in one factor, linearly unless it is marked ``infer={"nonlinear": True}``."""
        blora = self.adapted(guide=MeanField(init_scale=1.0))
        for parameter in blora.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        p = poutine.trace(blora.model.updates).get_trace()
        q, other = (poutine.trace(blora.guide).get_trace() for _ in range(2))
        start = {name: q.nodes[name]["value"] for name in _latents(q)}
        for name, first in start.items():
            factors = []
            for share in (0.0, 0.5, 1.0):  # a line, which a linear map takes to another line
                value = first.lerp(other.nodes[name]["value"], share)
                updates = poutine.condition(blora.model.updates, data={**start, name: value})()
                factors.append([u.without_noise().factors for u in updates.values()])
            for ours in zip(*factors, strict=True):
                moved = [f for f in zip(*ours, strict=True) if not torch.equal(f[0], f[2])]
                assert len(moved) < 2, f"{name} must be in one factor of the update, not in more."
                for a, middle, b in moved if is_linear(p.nodes[name]) else ():
                    bend = (a - 2 * middle + b).abs().max() / (a - b).abs().max()
                    assert bend < 1e-3, (
                        f"{name}: the update is not linear in it; mark it nonlinear."
                    )


class GuideContract(PairContract):
    """The tests of a guide family, by itself and with a hierarchical prior; override ``make()``.

    Attributes:
        starts_at_prior: whether q equals a normal prior at ``init_scale=1``. Set it to ``False``
            for a family that is not normal. Default: ``True``.
    """

    noun = "guide"
    starts_at_prior: ClassVar[bool] = True

    def test_draws_have_the_shapes_and_the_support_of_the_site(self) -> None:
        """For three layers and events of several shapes, in a draw and in the center."""
        for event in ((), (4,), (2, 3)):
            one = torch.ones(3, *event)
            for normal in (dist.Normal(one, one), dist.HalfNormal(one), dist.Beta(one, one)):
                p = normal.to_event(len(event))
                q = self.make().bind(Site("g.s", p, ()))
                drawn = q.forward().expand(torch.Size([5, 3]))
                value, center = drawn(), q.center()
                given = tuple(drawn.log_prob(value).shape), tuple(value.shape), tuple(center.shape)
                assert given == ((5, 3), (5, 3, *event), (3, *event)), f"For {event}: {given}."
                _check_support(type(q).__name__, p, value, center)

    def _bound(self, site: Site, init_scale: float) -> SiteGuide:
        """The family at ``site``, of that width if it has the option."""
        options = self.make().options()
        width = {"init_scale": init_scale} if "init_scale" in options else {}
        return cast(SiteGuide, type(self.make())(**options | width).bind(site))

    @torch.no_grad()
    def test_the_kl_is_that_of_draws(self) -> None:
        """A registered KL is the mean log ratio of draws; and q starts at a normal prior."""
        torch.manual_seed(0)
        p = dist.Normal(torch.zeros(3, 2, 2), 1.0).to_event(2)
        q = self._bound(Site("g.V", p, ()), 1.0)
        starts = self.starts_at_prior and "init_scale" in q.options()
        assert list(q.parameters()), f"The family has no parameters: {_PARAMS}."
        for spread in (0.0, 0.3):
            for parameter in q.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
            drawn = q.distribution().expand(torch.Size([20_000, 3]))
            value = drawn()
            ratio = (drawn.log_prob(value) - p.log_prob(value)).sum(-1)
            mean, error = float(ratio.mean()), 5 * float(ratio.std()) / len(ratio) ** 0.5
            if starts and not spread:
                message = (
                    f"At init_scale=1, q is not the prior: KL {mean}; is starts_at_prior=False?"
                )
                assert ratio.abs().max() < 1e-3, message
            with suppress(NotImplementedError):  # then Pyro estimates it from draws
                kl = float(torch.distributions.kl_divergence(q.distribution(), p).sum())
                assert isclose(kl, mean, abs_tol=error + 1e-3), f"The KL is {kl}, by draws {mean}."

    def test_the_draws_are_of_the_density(self) -> None:
        r"""This holds after the parameters have moved, too, and draws move with the parameters.

        If q integrates to one and its draws follow it, :math:`E_q[f p / q] = E_p[f]` for every
        density p where q is positive: with the weights p / q the draws have the moments of p, and
        the slope of the mean weight is zero in every parameter. Here p is a normal fitted to the
        tenth of the draws around the median. A point has no density, so it passes.
        """
        one = torch.ones(())
        priors = dist.Normal(0 * one, one), dist.HalfNormal(one), dist.Beta(one, one)
        for prior, shape in zip(priors, ((1, 2, 2), (2,), (2, 2)), strict=True):
            torch.manual_seed(0)
            p = prior.expand(torch.Size(shape)).to_event(len(shape) - 1)
            site = Site("g.s", p, ())
            q = self._bound(site, 0.1)
            for parameter in q.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            if isinstance(q, Laplace):
                q.finish({site.name: q}, [{site.name: torch.randn(8, 3, *site.shape)}])
            point = q.distribution()
            if isinstance(getattr(point, "base_dist", point), dist.Delta | Members):
                return
            for part, misses in _misses(q).items():
                mean, error = misses.mean(0), 6 * misses.std(0) / len(misses) ** 0.5 + 0.02
                worst = (mean.abs() / error).argmax()
                off, bar = float(mean.flatten()[worst]), float(error.flatten()[worst])
                assert abs(off) < bar, (
                    f"At a {type(prior).__name__} site the draws of {type(q).__name__} do not "
                    f"follow its density: with the weights p / q they miss {part} by {off:.3f} +- "
                    f"{bar:.3f}. Check the sign of the log-Jacobian, and that rsample() detaches "
                    "no parameter."
                )


class LikelihoodContract(_Contract):
    """The tests of a likelihood; override ``make()``, with ``num_data=12``, and ``batch()``.

    For another network than a causal language model, also override ``net()``, and if labels are
    not classes ``wrong``, numbers each of which is put in all places of the first label.
    """

    noun = "likelihood"
    wrong: ClassVar[Sequence[float]] = (99, -3)  # labels that mean nothing

    def test_labels_are_checked_and_absent_ones_sampled(self) -> None:
        """A wrong label raises ``BatchError``; a batch for prediction needs none."""
        blora, batch = self.adapted(), self.batch(4)
        for wrong in self.wrong:
            labels, message = batch["labels"].clone(), ""
            labels[0, ...] = wrong
            try:
                blora.model({**batch, "labels": labels})
            except BatchError as error:
                message = str(error)
            named = str(wrong) in message or "-100" in message
            assert named, f"Label {wrong} must raise a BatchError that names it, got {message!r}."
        unlabeled = {key: batch[key] for key in blora.likelihood.keys}
        site = poutine.trace(blora.model).get_trace(unlabeled).nodes["labels"]
        assert not site["is_observed"], "labels() must be None where the batch has none."
        _check_support("labels", site["fn"], site["value"])

    def test_the_data_is_scaled_to_num_data(self) -> None:
        """Each of ``P`` particles sees ``B / P`` examples, scaled to all ``N`` of them."""
        blora, batch = self.adapted(), self.batch(4)
        for particles in (1, 2, 4):
            with pyro.plate("num_particles_vectorized", particles, dim=-2):
                nodes = poutine.trace(blora.model).get_trace(batch).nodes
            fn, scale = nodes["labels"]["fn"], nodes["labels"]["scale"]
            given = fn.batch_shape[-1], scale, nodes["data"]["fn"].size
            assert given == (4 // particles, 3 * particles, 12), f"{particles=}: {given}."

    def test_padding_changes_nothing(self) -> None:
        """Two more columns of padding leave each row's probabilities as they are."""
        blora, batch = self.adapted(), self.batch(4)
        length, wider = batch["input_ids"].shape[-1], dict(batch)
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == length:
                wider[key] = nn.functional.pad(value, (0, 2), value=-100 if key == "labels" else 0)
        expected, padded = (blora.log_predictive(rows, 0) for rows in (batch, wider))
        assert torch.allclose(padded, expected, atol=1e-5), f"{expected}, with padding {padded}."

    def test_a_prediction_outlives_a_training(self) -> None:
        """What is learned enters a prediction through the logits; its scores are finite."""
        blora, batch = self.adapted(), self.batch(4)
        if blora.likelihood.predicts:
            prediction = blora.predict(batch, 2)
            before = prediction.mean.clone(), prediction.stddev.clone()
            for parameter in blora.likelihood.parameters():
                parameter.data.add_(0.5)
            after = prediction.mean, prediction.stddev
            same = all(map(torch.equal, before, after))
            assert same, "distribution() reads parameters; pass them through logits()."
            labels = blora.likelihood.labels(blora.model.prepared(batch))
            assert labels is not None
            scores = blora.likelihood.metrics(prediction, labels)
            assert all(map(isfinite, scores.values())), f"metrics() must be finite, got {scores}."

    def test_each_parameter_has_a_role_and_a_gradient(self) -> None:
        """``roles`` names the learned parameters, all of which the labels' density depends on."""
        blora, batch = self.adapted(), self.batch(4)
        learned = dict(blora.likelihood.named_parameters())
        names = {name.removesuffix("_unconstrained") for name in learned}
        roles = {*blora.likelihood.roles}
        assert names == roles, f"roles must name {sorted(names)}, got {sorted(roles)}."
        site = poutine.trace(blora.model).get_trace(batch).nodes["labels"]
        site["fn"].log_prob(site["value"]).sum().backward()
        still = [name for name, parameter in learned.items() if parameter.grad is None]
        assert not still, f"No gradient reaches {still}; pass them through logits()."

    def test_each_row_has_its_own_label(self) -> None:
        """Rows are independent, labels matter, and gradients reach the update."""
        blora, batch = self.adapted(), self.batch(4)
        pairs = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
        logp, *apart = (blora.log_predictive(rows, 0) for rows in (batch, *pairs))
        assert logp.shape == (4,), f"log_prob of 4 examples is {tuple(logp.shape)}: use to_event."
        assert torch.allclose(logp, torch.cat(apart), atol=1e-5), f"{logp}, in pairs {apart}."
        other = blora.log_predictive({**batch, "labels": batch["labels"].roll(1, 0)}, 0)
        assert not torch.allclose(logp, other), "Other labels have the same probabilities."
        site = poutine.trace(blora.model).get_trace(batch).nodes["labels"]
        score = site["fn"].log_prob(site["value"])
        assert score.requires_grad, "No gradient reaches the update; does logits() detach?"


def _train(blora: BayesianLoRA, batch: dict[str, Any], steps: int = 3, *, svi: bool) -> float:
    """The last loss of some steps of ``SVI``, or of Adam on the ELBO as a module, in nats."""
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
    if svi:
        loop = SVI(blora.model, blora.guide, ClippedAdam({"lr": 1e-2}), elbo)
        return [float(loop.step(batch)) for _ in range(steps)][-1]
    loss_of = elbo(blora.model, blora.guide)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
    norms = {n: p.grad.norm() if p.grad is not None else 0 for n, p in blora.named_parameters()}
    wrong = {name: float(norm) for name, norm in norms.items() if not 0 < norm < inf}
    assert not wrong, f"After {steps} steps gradients have the norms {wrong}: {_PARAMS}."
    return float(loss.detach())


def _misses(q: SiteGuide) -> dict[str, Tensor]:
    """By name, what must be zero on average, in 50 batches of draws with the weights p / q."""
    transform, parameters = q.site.transform, list(q.parameters())
    names = [n.removesuffix("_unconstrained") for n, _ in q.named_parameters()]

    def draw() -> tuple[Tensor, Tensor]:
        """Unconstrained draws, ``(2000, k)``, and their log densities, by one way or by two."""
        density = q.forward().expand(torch.Size([2000, *q.site.batch_shape]))
        value = density()
        real, scores = transform.inv(value), [density.log_prob(value)]
        # some score their draws by the noise, and some flows can score no other value
        with suppress(NotImplementedError, KeyError):
            scores.append(density.log_prob(value.clone()))
        change = transform.log_abs_det_jacobian(real, value)
        return real.flatten(1), (torch.stack(scores) + change).sum(-1)

    with torch.no_grad():
        value, _ = draw()
        error = value - value.median(0).values
        near = value[(error / error.abs().median(0).values).norm(dim=-1).argsort()[:200]]
        # beside the median, because there the slopes of a symmetric q are zero in any case
        p = dist.MultivariateNormal(near.mean(0) + near.std(0) / 2, near.mT.cov())

    def batch() -> dict[str, Tensor]:
        value, log_q = draw()
        weight = (p.log_prob(value) - log_q).exp().mean(0)
        slopes = torch.autograd.grad(weight.mean(), parameters, materialize_grads=True)
        value, weight = value.detach(), weight.detach()
        noise = torch.linalg.solve_triangular(p.scale_tril, (value - p.loc).mT, upper=False)
        return {
            "the integral of p": (weight - 1).mean(-1),
            "the mean of p": (noise * weight).mean(-1),
            "the variance of p": ((noise.square() - 1) * weight).mean(-1),
            **{f"a slope of zero in {n}": slope for n, slope in zip(names, slopes, strict=True)},
        }

    batches = [batch() for _ in range(50)]
    return {name: torch.stack([each[name] for each in batches]) for name in batches[0]}


def _latents(trace: poutine.Trace) -> list[str]:
    return list(prune_subsample_sites(trace).stochastic_nodes)


def _check_support(name: str, fn: Any, *values: Tensor) -> None:
    for value in values:
        assert Site(name, fn, ()).support.check(value).all(), f"{name}: {fn} excludes {value}."
