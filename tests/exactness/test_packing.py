"""An item's options behind one encoding of its question score as they do by themselves."""

import pyro
import pytest
import tiny
import torch
from choice_batches import BATCHES, batch_of, premises
from elbo_estimates import loud
from tiny import adapted, gpt2, llama, qwen2
from torch.nn import functional

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.likelihoods.packing import supports_packing

NETS = {
    "llama": lambda: llama(attn_implementation="sdpa"),
    "llama, eager": lambda: llama(attn_implementation="eager"),
    "qwen2": qwen2,
    "gpt2": gpt2,
}
TARGETS = {"gpt2": ["c_attn", "lm_head"]}


def scores_by_hand(net, batch, score):
    """Each option alone, without padding, from the network's full logits."""
    result = torch.full(batch["input_ids"].shape[:2], -torch.inf)
    for i, k in batch["option_mask"].any(-1).nonzero().tolist():
        ids = batch["input_ids"][i, k][batch["attention_mask"][i, k].bool()]
        scored = batch["option_mask"][i, k].nonzero().squeeze(-1)
        logp = functional.log_softmax(net(input_ids=ids[None]).logits[0], -1)
        logp = logp[scored - 1, ids[scored]]
        result[i, k] = logp.mean() if score == "mean" else logp.sum()
    return result


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("case", [*BATCHES, "premises"])
def test_scores_by_hand(name, case):
    net = loud(NETS[name]())
    batch = premises() if case == "premises" else batch_of(BATCHES[case])
    for score in ("mean", "sum"):
        expected = scores_by_hand(net, batch, score)
        for packed in (True, False):
            scores = MultipleChoice(score=score, pack=packed).logits(net, batch)
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected[expected.isfinite()].std() > 0.1 or expected.isfinite().sum() < 3


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_the_network_is_probed_once_for_packing(name):
    net = NETS[name]()
    rows = []
    net.get_input_embeddings().register_forward_hook(lambda m, args, out: rows.append(len(out)))
    batch = batch_of(BATCHES["equal first tokens"])
    likelihood = MultipleChoice()
    for _ in range(2):
        likelihood.logits(net, batch)
    # Probed once, packed (1 row) and not (2); then a row for each item.
    assert rows == [1, 2, len(batch["labels"]), len(batch["labels"])]
    assert likelihood.options()["pack"] is None


@torch.no_grad()
def test_a_network_that_ignores_the_mask_does_not_pack():
    assert supports_packing(loud(llama()))
    net = loud(llama())
    forward = net.forward

    def without_mask(input_ids, attention_mask=None, **kwargs):
        return forward(input_ids, **kwargs)

    net.forward = without_mask
    with pytest.warns(UserWarning, match="options packed behind one question"):
        assert not supports_packing(net)


@pytest.mark.parametrize("packed", [True, False])
def test_a_first_token_is_not_scored(packed):
    batch = batch_of([((), [(5, 6), (7,)], 0)])
    with pytest.raises(BatchError, match=r"at their first token, which nothing predicts"):
        MultipleChoice(pack=packed).logits(llama(), batch)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("head", [False, True])
def test_adapters_particles_and_gradients(name, particles, head):
    targets = list(TARGETS.get(name, ["q_proj", "v_proj", "lm_head"]))
    batch = batch_of(BATCHES["absent options"])
    blora = adapted(
        loud(NETS[name]()),
        target_modules=targets if head else targets[:-1],
        likelihood=MultipleChoice(num_data=6),
    )
    tiny.shaken(blora.guide, 0.5)
    elbo = tiny.elbo(particles)
    losses, gradients = [], []
    for packed in (True, False):
        blora.likelihood.pack = packed
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(blora.model, blora.guide, batch)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(blora.parameters())))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
