"""Informed directions against the eigenvectors of dense gradients, one example at a time."""

import sys
import warnings

import pyro
import pytest
import tiny
import torch
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from pyro_blora.errors import BatchError
from pyro_blora.inference import fit, inform
from pyro_blora.models import FisherInducing

RANK = 3


@pytest.fixture(autouse=True)
def _own_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def dense_moments(net, likelihood, names, batch, labels):
    """``E[G G^T]`` and ``E[G^T G]`` of each layer, by autograd on the weights themselves."""
    moments = {name: [0.0, 0.0] for name in names}
    for i, label in enumerate(labels):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        weights = [net.get_submodule(name).weight.requires_grad_() for name in names]
        logp = likelihood.logits(net, one).log_softmax(-1)[0, label]
        for name, G in zip(names, torch.autograd.grad(logp, weights), strict=True):
            moments[name][0] += G @ G.mT
            moments[name][1] += G.mT @ G
    return moments


def informed(net, **options):
    return tiny.adapted(net, prior=FisherInducing(rank=RANK), **options)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_directions_are_the_top_eigenvectors_of_the_networks_own_gradients(make, monkeypatch):
    module = sys.modules["pyro_blora.inference.fisher"]
    monkeypatch.setattr(module, "_OVERSAMPLED", 48)  # every column: exact
    net = make()
    blora = informed(net, target_modules=None)
    rows = tiny.examples()
    inform(blora, rows, collate=tiny.collate, batch_size=len(rows), seed=3)
    names, batch = blora.model.layer_names, tiny.collate(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    batch = {key: value[order] for key, value in batch.items()}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        logits = blora.likelihood.logits(net, batch)
        labels = torch.distributions.Categorical(logits=logits).sample()
    blora.unwrap()
    moments = dense_moments(net, blora.likelihood, names, batch, labels.tolist())
    for group in blora.model.groups:
        prior = getattr(blora.model, group.name)
        for layer, name in enumerate(group.module_names):
            sides = moments[name]
            if isinstance(net.get_submodule(name), Conv1D):  # its weight is d_in x d_out
                sides = sides[::-1]
            for Z, C in zip((prior.Z_r[layer], prior.Z_c[layer]), sides, strict=True):
                values, vectors = (x.flip(-1)[..., :RANK] for x in torch.linalg.eigh(C))
                expected = vectors * (values / values.mean()).sqrt()  # up to each one's sign
                torch.testing.assert_close(Z.mT @ Z, expected @ expected.mT, atol=1e-6, rtol=1e-5)


def test_fit_informs_once_and_the_directions_then_stay():
    blora = informed(tiny.llama())
    prior = blora.model.q_proj
    start = prior.Z_c.clone()
    fit(blora, tiny.examples(), collate=tiny.collate, num_steps=2)
    assert prior.informed
    found = prior.Z_c.clone()
    assert not torch.allclose(start, found)
    fit(blora, tiny.examples()[:3], collate=tiny.collate, num_steps=2)
    assert torch.equal(prior.Z_c, found)
    assert not any("Z_" in name for name, _ in blora.named_parameters())


def test_informing_draws_apart_and_leaves_the_network_as_it_was():
    net = tiny.llama().train()
    blora = informed(net)
    before = torch.get_rng_state()
    inform(blora, tiny.examples(), collate=tiny.collate)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(adapter.update is None for adapter in blora.model.adapters)


def test_a_data_loader_informs_with_its_first_batches():
    rows = tiny.examples()
    ours, theirs = informed(tiny.llama()), informed(tiny.llama())
    theirs.net.load_state_dict(ours.net.state_dict())
    loader = DataLoader(rows, 5, collate_fn=tiny.collate, generator=torch.Generator())
    inform(ours, loader)
    in_order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).argsort()
    inform(theirs, [rows[i] for i in in_order], collate=tiny.collate, batch_size=5)
    torch.testing.assert_close(ours.model.q_proj.Z_c, theirs.model.q_proj.Z_c)
    inform(theirs, loader, num_examples=5)
    assert not torch.allclose(ours.model.q_proj.Z_c, theirs.model.q_proj.Z_c)


def test_a_loop_of_ones_own_is_told_once_of_random_directions():
    blora, batch = informed(tiny.llama()), tiny.sequences()
    with pytest.warns(UserWarning, match=r"call pyro_blora.inference.inform") as told:
        blora.model(batch)
    assert len(told) == len(blora.model.groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blora.model(batch)
    other = informed(tiny.llama())
    inform(other, tiny.examples(), collate=tiny.collate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.model(batch)


def test_there_must_be_data():
    with pytest.raises(BatchError, match="data set is empty"):
        inform(informed(tiny.llama()), [], collate=tiny.collate)
