"""Directions learn from some of the examples, everything else from the others."""

import itertools

import pyro
import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader

from pyro_blora import fit
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Amortized
from pyro_blora.inference.batches import Batches
from pyro_blora.inference.learning_rates import LEARNING_RATES, parameter_groups
from pyro_blora.inference.loop import LoopOptions
from pyro_blora.inference.sample_splitting import learners, parts_of
from pyro_blora.likelihoods import MultipleChoice, SequenceClassification
from pyro_blora.models import GaussianFactors, KroneckerInducing

ROWS = tiny.examples(12)
DIRECTIONS, OTHERS = parts_of(12, 0.75, 0)


def flipped(indices):
    """The examples, those of these indices with another label."""
    return [
        {**row, "label": (row["label"] + 1) % 3} if i in indices else row
        for i, row in enumerate(ROWS)
    ]


def trained(rows, *, prior=None, steps=8, **options):
    """The trained tensors, those of the directions and the others."""
    pyro.set_rng_seed(3)
    blora = tiny.adapted(num_data=12, prior=prior or KroneckerInducing(rank=2))
    usual = {"collate": tiny.collate, "batch_size": 4, "progress": False}
    usual |= {"split_after": 0} if options.get("direction_share") else {}
    options = {**usual, **options}
    fit(blora, rows, num_steps=steps, **options)
    state = {name: value.detach().clone() for name, value in blora.named_parameters()}
    names = [name for name in state if ".Z_" in name]
    return {n: state[n] for n in names}, {n: state[n] for n in state if n not in names}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_parts_share_out_all_examples():
    assert (len(DIRECTIONS), len(OTHERS)) == (9, 3)
    assert sorted(DIRECTIONS + OTHERS) == list(range(12))
    assert parts_of(12, 0.75, 1) != (DIRECTIONS, OTHERS)
    assert list(map(len, parts_of(2, 0.9, 0))) == list(map(len, parts_of(2, 0.1, 0))) == [1, 1]
    assert parts_of(1, 0.75, 0) == ()


def test_batches_mix_no_parts_and_take_turns_in_proportion():
    stream = Batches(ROWS, tiny.collate, LoopOptions(1, batch_size=3), parts=[DIRECTIONS, OTHERS])
    for _ in range(3):  # epochs
        batches = [indices for indices, _ in itertools.islice(stream, 4)]
        assert sorted(itertools.chain(*batches)) == list(range(12))
        assert [set(batch) <= set(DIRECTIONS) for batch in batches] == [True, True, False, True]
        assert all(set(b) <= set(DIRECTIONS) or set(b) <= set(OTHERS) for b in batches)


def test_labels_of_either_part_reach_their_own_parameters_alone():
    slow = {"lr_mean": 0.0, "lr_scale": 0.0, "direction_share": 0.75}  # directions alone move
    directions, _ = trained(ROWS, **slow)
    assert same(directions, trained(flipped(OTHERS), **slow)[0])
    assert not same(directions, trained(flipped(DIRECTIONS), **slow)[0])
    _, others = trained(ROWS, lr_direction=0.0, direction_share=0.75)
    assert same(others, trained(flipped(DIRECTIONS), lr_direction=0.0, direction_share=0.75)[1])
    assert not same(others, trained(flipped(OTHERS), lr_direction=0.0, direction_share=0.75)[1])


def test_the_first_epochs_are_as_without_parts():
    parts = (DIRECTIONS, OTHERS)
    whole = Batches(ROWS, tiny.collate, LoopOptions(1, batch_size=5))
    later = Batches(ROWS, tiny.collate, LoopOptions(1, batch_size=5), None, parts, 2)
    for _ in range(6):  # three batches an epoch
        assert next(whole)[0] == next(later)[0]
        assert not later.parted
    assert set(next(later)[0]) <= set(DIRECTIONS)
    assert later.parted
    assert not whole.parted


def test_after_them_labels_reach_their_own_parameters_alone():
    """Three batches an epoch: the labels change after two, and with them what learns from them."""

    def directions(indices):
        rows = list(ROWS)

        def change(done):
            if done == 6:
                rows[:] = flipped(indices)

        slow = {"lr_mean": 0.0, "lr_scale": 0.0, "direction_share": 0.75, "split_after": 2}
        return trained(rows, steps=9, callback=change, **slow)[0]

    assert same(directions([]), directions(OTHERS))
    assert not same(directions([]), directions(DIRECTIONS))


def test_it_is_the_default_of_a_prior_that_leaves_directions_out():
    """After six epochs, 24 batches of three."""

    def default(keep=0.9, rows=ROWS, steps=28, **options):
        options = {"batch_size": 3, "split_after": None, **options}
        return trained(rows, prior=KroneckerInducing(rank=2, keep=keep), steps=steps, **options)[0]

    assert same(default(), default(direction_share=0.75, split_after=6))
    assert not same(default(), default(direction_share=0.0))
    assert same(default(steps=24), default(steps=24, direction_share=0.0))
    assert same(default(1.0), default(1.0, direction_share=0.0))
    loader = {"rows": DataLoader(ROWS, 3, collate_fn=tiny.collate), "collate": None}
    assert same(default(**loader), default(**loader, direction_share=0.0))
    of_one_batch = {"batch_size": 4}  # the others are three
    assert same(default(**of_one_batch), default(**of_one_batch, direction_share=0.0))


def test_it_is_no_default_where_a_group_has_another_prior_or_directions_are_held():
    kronecker = KroneckerInducing(rank=2, keep=0.9)
    mixed = {"q_proj": kronecker, ".*": GaussianFactors(rank=2, random="both")}
    options = {"batch_size": 3, "steps": 8}
    left, right = (
        trained(ROWS, prior=mixed, **share, **options) for share in ({}, {"direction_share": 0.0})
    )
    assert same(left[0], right[0])
    assert same(left[1], right[1])
    blora = tiny.adapted(num_data=12, prior=kronecker)
    for name, parameter in blora.named_parameters():
        parameter.requires_grad_(".Z_" not in name)
    how = {"collate": tiny.collate, "batch_size": 3, "progress": False}
    fit(blora, ROWS, num_steps=2, **how)
    with pytest.raises(ConfigurationError, match="no directions to train here"):
        fit(blora, ROWS, num_steps=2, direction_share=0.75, **how)


def test_a_head_that_no_kl_sees_learns_with_the_directions():
    likelihood = SequenceClassification(num_data=12)
    blora = tiny.adapted(tiny.bert(), target_modules=None, likelihood=likelihood)
    groups = parameter_groups(nn.ModuleList([blora.model, blora.guide]), LEARNING_RATES)
    heads = [p for group in groups if group["name"] == "head" for p in group["params"]]
    directions, others = learners(blora.model, groups)
    assert heads
    assert {id(p) for p in heads} <= {id(p) for p in directions}
    assert not {id(p) for p in heads} & {id(p) for p in others}


def test_directions_are_the_priors():
    blora = tiny.adapted(guide=Amortized(hidden=3))  # whose own weights take a direction's rate
    named = {id(parameter): name for name, parameter in blora.named_parameters()}
    groups = parameter_groups(blora, LEARNING_RATES)
    directions, others = learners(blora.model, groups)
    assert {named[id(p)].split(".")[-1][:3] for p in directions} == {"Z_r", "Z_c"}
    assert len(directions) + len(others) == len(named)
    assert any("hidden_weight" in named[id(p)] for p in others)


def test_the_likelihood_s_parameters_are_not_the_directions():
    blora = tiny.adapted(likelihood=MultipleChoice(num_data=12))
    _, others = learners(blora.model, parameter_groups(blora, LEARNING_RATES))
    own = {id(parameter) for parameter in blora.likelihood.parameters()}
    assert len(own) == 2  # the scale of the scores and the exponent of the length
    assert own <= {id(parameter) for parameter in others}


def test_without_directions_there_is_nothing_to_part():
    with pytest.raises(ConfigurationError, match="there are no directions to train here"):
        trained(ROWS, prior=GaussianFactors(rank=2, random="both"), direction_share=0.75)


def test_a_split_that_nothing_comes_of_is_refused():
    loader = {"rows": DataLoader(ROWS, 3, collate_fn=tiny.collate), "collate": None}
    some = {"rows": ROWS, "prior": KroneckerInducing(rank=2, keep=0.9)}
    few = {**some, "batch_size": 4}  # the others are three
    for asked in ({"rows": ROWS}, {**some, **loader}, few, {**some, "direction_share": 0.0}):
        with pytest.raises(ConfigurationError, match="split_after=3: nothing is split"):
            trained(**asked, split_after=3)


def test_no_epochs():
    with pytest.raises(ConfigurationError, match="split_after=-1 must be epochs, 0 or more"):
        trained(ROWS, split_after=-1)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_no_share(share):
    with pytest.raises(ConfigurationError, match=r"direction_share=.* must be a share in \[0, 1\)"):
        trained(ROWS, direction_share=share)


def test_a_loader_tells_no_examples():
    loader = DataLoader(ROWS, 4, collate_fn=tiny.collate)
    with pytest.raises(ConfigurationError, match="a DataLoader does not tell"):
        trained(loader, collate=None, direction_share=0.5)
