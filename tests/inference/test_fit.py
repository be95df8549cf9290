"""The ready-made loop: history, particles, warm-up, validation, seeds, the order of the data."""

import itertools
import math

import pyro
import pytest
import tiny
import torch
from own_classes import Sloped
from pyro.infer import SVI
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.optim import ClippedAdam
from torch.utils.data import ConcatDataset, DataLoader

from pyro_blora import BayesianLoRA
from pyro_blora.data.batches import endless_batches
from pyro_blora.guides import Delta, Ensemble, MeanField
from pyro_blora.inference import RATES, learning_rates, loop, optim_args, parameter_groups
from pyro_blora.likelihoods import CausalLM, SequenceClassification
from pyro_blora.models import KroneckerInducing


@pytest.mark.parametrize("weight", [1.0, 0.8])
def test_history(weight):
    blora = tiny.adapted(num_data=10)
    kl = blora.kl().item()
    result = tiny.train(blora, kl_weight=weight)
    assert [set(step) for step in result.history] == [{"loss", "nll", "kl", "acc", "conf"}] * 6
    assert result.history[0]["kl"] == pytest.approx(kl, rel=1e-3)
    for step in result.history:
        assert step["loss"] == pytest.approx(step["nll"] + weight * step["kl"] / 10, rel=1e-5)


@pytest.mark.parametrize(("requested", "expected"), [(1, {1}), (3, {2}), (None, {2, 4})])
def test_the_number_of_particles_divides_the_batch(requested, expected):
    """The largest divisor of four, or of the last two, that is at most the requested number."""
    blora, seen = tiny.adapted(num_data=10), []
    blora.model.register_forward_hook(lambda _, args, updates: seen.append((args[0], updates)))
    tiny.train(blora, num_particles=requested)  # by default one for each example
    # the last, incomplete batch is trained on
    assert sorted(len(batch["labels"]) for batch, _ in seen) == [2, 2, 4, 4, 4, 4]
    assert {updates["q_proj"].particle_shape.numel() for _, updates in seen} == expected


# Validation labels that training contradicts, so that an early step is the best one
CONTRARY = [{**row, "label": (row["label"] + 1) % 3} for row in tiny.examples(10)]
VALIDATED = {"validate_every": 2, "num_steps": 13, "eval_samples": 0}
VALIDATED["learning_rates"] = {"mean": 0.2, "direction": 0.1}


def contrary_nll(blora):
    batch = tiny.collate(CONTRARY)
    return -blora.predict(batch, 0).probs.gather(-1, batch["labels"][:, None]).log().mean().item()


@pytest.mark.parametrize(
    ("keep", "validation"),
    [(False, CONTRARY), (True, DataLoader(CONTRARY, 3, collate_fn=tiny.collate))],
)
def test_keep_best_goes_back_to_the_best_validation(keep, validation):
    blora, seen = tiny.adapted(num_data=10), []
    options = {"validation": validation, "callback": seen.append, **VALIDATED}
    result = tiny.train(blora, keep_best=keep, **options)
    losses = dict(result.validation)
    assert set(losses) == {2, 4, 6, 8, 10, 12, 13}
    expected = [(k, f, losses.get(k)) for k, f in enumerate(result.history, 1)]
    assert [(each.step, each.figures, each.validation) for each in seen] == expected
    lowest = min(losses.values())
    assert losses[result.best_step] == lowest < losses[13] - 0.05
    assert contrary_nll(blora) == pytest.approx(lowest if keep else losses[13], rel=1e-4)
    # The kept state is a copy, not the tensors that went on training
    assert tiny.equal(result.best_state, blora.state_dict()) == keep


@pytest.mark.parametrize(("patience", "validations"), [(1, 2), (2, 5), (3, 6), (4, 6), (None, 6)])
def test_patience_ends_with_the_validations_that_are_not_lower(patience, validations, monkeypatch):
    """An equal loss is not lower, a lower one resets the count, and the last step is not early.

    One that is no number is never the best.
    """
    for losses in ([3.0, 4.0, 2.0, 3.0, 2.0, 2.0], [3.0, math.nan, 2.0, math.nan, 2.0, 2.0]):
        blora = tiny.adapted(num_data=10)
        given = map(torch.tensor, [[-loss] for loss in losses])
        monkeypatch.setattr(blora, "log_predictive", lambda *_, given=given: next(given))
        options = {"validation": tiny.examples(4), "validate_every": 2, "num_steps": 12}
        result = tiny.train(blora, patience=patience, **options)
        seen = [loss for _, loss in result.validation]
        assert str(seen) == str(losses[:validations])
        assert len(result.history) == 2 * validations
        assert result.stopped_early == (validations < 6)
        assert result.best_step == (2 if validations == 2 else 6)


@pytest.mark.parametrize(("epochs", "steps"), [(2, 6), (0.5, 2)])
def test_epochs_instead_of_steps(epochs, steps):
    loader = DataLoader(tiny.examples(10), 4, collate_fn=tiny.collate)
    for rows in (None, loader):
        result = tiny.train(tiny.adapted(num_data=10), rows, num_steps=None, num_epochs=epochs)
        assert len(result.history) == steps


def test_validation_leaves_training_mode():
    """The first pass measures sizes; dropout is for training."""
    blora = tiny.probed(tiny.adapted(num_data=10, guide=MeanField(init_scale=1.0)))
    modes = []
    blora.net.register_forward_pre_hook(lambda net, args: modes.append(net.training))
    tiny.train(blora, validation=tiny.examples(3), num_steps=2, validate_every=1)
    assert modes == [False, True, False, True, False]
    assert not blora.net.training


def test_validation_leaves_no_trace_in_training():
    net, found = tiny.llama(), []
    for options in ({}, {"validate_every": 1, "validation": tiny.examples(9)}):
        torch.manual_seed(0)
        blora = tiny.adapted(net, guide=Ensemble(), num_data=10)
        result = tiny.train(blora, **options)
        found.append(blora.state_dict() | {"next": torch.rand(2)})
        losses = [loss for _, loss in result.validation]
        assert len(losses) == len(set(losses)) == (6 if options else 0)
        blora.unwrap()
    assert tiny.equal(*found)


def test_a_seed_reproduces_every_bit():
    ends = []
    for seed in (3, 3, 4):
        torch.manual_seed(1)
        blora = tiny.adapted(num_data=10)
        torch.manual_seed(10 + len(ends))
        ends.append((tiny.train(blora, seed=seed).history, tiny.trained(blora)))
    (history, state), (again, same), (other, _) = ends
    assert history == again != other
    assert tiny.equal(same, state)


@pytest.mark.parametrize(
    ("kind", "scales"),
    [(AutoNormal, ["scales"]), (AutoLowRankMultivariateNormal, ["scale", "cov_factor"])],
)
def test_the_scales_of_an_autoguide_are_scales(kind, scales):
    blora = tiny.adapted(guide=kind)
    blora.guide(tiny.sequences())
    groups = {g["name"]: {*map(id, g["params"])} for g in parameter_groups(blora, tiny.sequences())}
    for name, parameter in blora.guide.named_parameters():
        first = name.partition(".")[0].removesuffix("_unconstrained")
        assert id(parameter) in groups["scale" if first in scales else "mean"], name


ROLES = {
    "mean": {"loc"},
    "direction": {"Z_r", "Z_c"},
    "head": {"classifier_weight", "classifier_bias"},
    "scale": {"D_r", "D_c", "sigma_", "row_scale_tril", "col_scale_tril"},
}


@pytest.mark.parametrize("role", ROLES)
def test_a_rate_of_zero_holds_its_role_still_and_no_other(role):
    likelihood = SequenceClassification(num_data=10)
    blora = tiny.adapted(tiny.bert(), target_modules=None, likelihood=likelihood)
    before = tiny.trained(blora)
    tiny.train(blora, DataLoader([tiny.sequences()], batch_size=None), learning_rates={role: 0.0})
    still = {n for n, value in tiny.trained(blora).items() if torch.equal(value, before[n])}
    assert {n.rpartition(".")[2].removesuffix("_unconstrained") for n in still} == ROLES[role]


def test_a_head_s_rate_is_a_step_of_a_logit_whatever_the_size_of_its_input():
    net, batch, inputs = tiny.roberta(), tiny.sequences(), {}
    torch.nn.init.constant_(net.roberta.encoder.layer[-1].output.LayerNorm.weight, 30)
    for layer in (net.classifier.dense, net.classifier.out_proj):
        layer.register_forward_hook(lambda module, given, _: inputs.update({module: given[0]}))
    net(batch["input_ids"], batch["attention_mask"])
    blora = BayesianLoRA(net, likelihood=SequenceClassification(num_data=4), rank=2)
    by_id = {id(p): g["lr"] for g in parameter_groups(blora, batch) for p in g["params"]}
    by_name = optim_args(blora, batch)
    for name in ("dense", "out_proj"):
        size = inputs[getattr(net.classifier, name)].abs().sum(-1).mean()
        expected = pytest.approx(RATES["head"] * math.log2(3) ** 0.5 / float(size), rel=1e-5)
        weight = getattr(blora.model.trained_heads, f"classifier_{name}_weight")
        assert by_id[id(weight)] == expected
        assert by_name(f"model.trained_heads.classifier_{name}_weight")["lr"] == expected


@pytest.mark.parametrize(("scored", "slower"), [(1, 1.0), (2, 4.0), (7, 8.0)])
def test_means_of_a_text_are_slower_by_its_scored_tokens(scored, slower):
    batch = tiny.texts(rows=3, length=12)
    batch["labels"] = torch.full((3, 12), -100)
    batch["labels"][:, 1 : 1 + scored] = 9
    blora = BayesianLoRA(tiny.llama(), rank=2, likelihood=CausalLM(num_data=3))
    for given, expected in ((None, RATES["mean"] / slower), ({"mean": 0.3}, 0.3)):
        rates = {g["name"]: g["lr"] for g in parameter_groups(blora, batch, given)}
        assert rates["mean"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:KL", "ignore:The adapter has not learned")
@pytest.mark.parametrize(("rate", "learned"), [(0.02, False), (0.8, True)])
def test_fit_says_when_an_adapter_has_not_learned(rate, learned):
    """Thirty random classes, of which a head that hardly moves says little, though it is right."""
    rows = tiny.examples(60)
    for k, row in enumerate(rows):
        row |= {"label": k % 30, "input_ids": torch.full_like(row["input_ids"], k % 30)}
    likelihood = SequenceClassification(num_data=60)
    blora = BayesianLoRA(tiny.bert(num_labels=30), rank=2, likelihood=likelihood)
    options = {"num_steps": 150, "batch_size": 20, "learning_rates": {"head": rate}}
    result = tiny.train(blora, rows, **options)
    assert result.has_learned is learned
    probs, labels = blora.predict(tiny.collate(rows), 64).probs, tiny.collate(rows)["labels"]
    right = (probs.argmax(-1) == labels).float().mean()
    assert result.accuracy == pytest.approx(float(right), abs=0.15)
    assert result.confidence == pytest.approx(float(probs.amax(-1).mean()), abs=0.15)


def test_schedule(monkeypatch):
    monkeypatch.setattr(loop, "_WARMUP", 0.25)
    rates = [loop.rate(step, 8) for step in range(9)]
    assert rates == pytest.approx([0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


@pytest.mark.parametrize("epochs", [None, 2])
def test_points_learn_for_some_epochs(epochs, monkeypatch):
    blora, seen = tiny.adapted(num_data=6), []
    bits = math.log2(3)  # of a label of three classes
    monkeypatch.setattr(KroneckerInducing, "point_epochs", epochs and epochs / bits)
    monkeypatch.setattr(learning_rates, "_POINT_STEPS", 1)
    options = {"batch_size": 3, "num_steps": 8, "callback": lambda _: seen.append(directions())}

    def directions():
        return {n: value for n, value in tiny.trained(blora).items() if ".Z_" in n}

    tiny.train(blora, tiny.examples(6), **options)
    for done, (before, now) in enumerate(itertools.pairwise(seen), 2):
        assert now
        still = [torch.equal(before[name], value) for name, value in now.items()]
        assert set(still) == {epochs == 2 and done > 4}, done


@pytest.mark.parametrize(("guide", "local"), [(None, True), (AutoNormal, False)])
def test_an_optimizer_of_pyro_takes_the_rates_of_the_method(guide, local):
    with pyro.settings.context(module_local_params=local):
        blora = tiny.adapted(guide=guide, likelihood=Sloped(num_data=12))
        batch = tiny.choices(3)
        optimizer = ClippedAdam(optim_args(blora, batch))
        SVI(blora.model, blora.guide, optimizer, tiny.elbo(3)).step(batch)
        groups = parameter_groups(blora, batch)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert {id(p): o.defaults["lr"] for p, o in optimizer.optim_objs.items()} == rates
        assert rates[id(blora.likelihood.slope_unconstrained)] == RATES["likelihood"]
        blora.likelihood.requires_grad_(False)
        assert optim_args(blora, batch)("model.likelihood.slope") == {"lr": 0.0}


def epochs(count, rows, *, by_length=True, seed=0):
    data = rows if by_length else ConcatDataset([rows])  # lengths are not read of it
    stream = endless_batches(data, tiny.collate, batch_size=4, seed=seed)
    per_epoch = -(-len(rows) // 4)
    drawn = [b["index"].tolist() for b in itertools.islice(stream, count * per_epoch)]
    return [drawn[i : i + per_epoch] for i in range(0, len(drawn), per_epoch)]


@pytest.mark.parametrize("count", [1, 23, 75])
@pytest.mark.parametrize("by_length", [False, True])
def test_every_example_is_once_in_each_epoch_of_an_order_of_its_own(count, by_length):
    drawn, again, other = (
        epochs(3, tiny.examples(count), by_length=by_length, seed=seed) for seed in (0, 0, 1)
    )
    for epoch in drawn:
        assert sorted(itertools.chain(*epoch)) == list(range(count))
        assert max(map(len, epoch)) <= 4
        # no more batches are incomplete than must be, but for one in each window of lengths
        assert sum(len(batch) < 4 for batch in epoch) <= 1
    assert drawn == again
    if count > 1:
        assert drawn != other
        assert {*map(frozenset, drawn[0])} != {*map(frozenset, drawn[1])}


def test_every_example_counts_once_in_expectation():
    """The weight of an example in a batch of b of N is N / b; the longest was always alone."""
    rows = [{"input_ids": torch.zeros(n + 1, dtype=int), "label": 0, "index": n} for n in range(9)]
    weights = torch.zeros(9, dtype=torch.float64)
    for epoch in epochs(4000, rows):
        for batch in epoch:
            weights[batch] += 9 / len(batch) / len(epoch) / 4000
    # alone with chance 1/9: a standard deviation of 0.04
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=0.12, rtol=0)


def test_examples_a_loader_and_the_trainer_end_alike(monkeypatch, tmp_path):
    """With a point and whole batches, so that neither draws nor the order of the data matter."""
    rows = tiny.rows_of(tiny.choices(12, seed=3))
    monkeypatch.setattr(learning_rates, "_POINT_STEPS", 1)
    monkeypatch.setattr(KroneckerInducing, "point_epochs", 2.0)
    monkeypatch.setattr(loop, "_WARMUP", 0.0)  # as in the Trainer
    monkeypatch.setattr(Delta, "is_point", False)  # or its directions would never stop
    net, ends = tiny.llama(), []
    options = {"num_steps": 9, "batch_size": 12, "precision": "float32"}
    in_trainer = {"max_steps": 9, "per_device_train_batch_size": 12, "data_collator": None}
    for run in (
        lambda blora: tiny.train(blora, rows, collate=None, **options),
        lambda blora: tiny.train(blora, DataLoader(rows, 12), collate=None, **options),
        lambda blora: tiny.trainer(tmp_path, blora, rows, **in_trainer).train(),
    ):
        pyro.set_rng_seed(0)
        blora = tiny.adapted(net, guide=Delta(), likelihood=Sloped(num_data=12))
        run(blora)
        assert blora.likelihood.slope != 1
        ends.append(tiny.trained(blora))
        blora.unwrap()
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], atol=1e-5, rtol=1e-4)
