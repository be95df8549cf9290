"""A tiny adapted Llama whose posterior is wide, and estimates of its ELBO with gradients."""

import pyro
import tiny
import torch
from tiny import ANSWERS, adapted, choices, llama, sequences
from torch.distributions import kl_divergence
from torch.nn import functional

from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens, MultipleChoice
from pyro_blora.models import KroneckerInducing
from pyro_blora.posterior.bayesian_lora_model import repeat_batch

B, NUM_DATA = 6, 30


def likelihood_of(name):
    if name == "LabelTokens":
        return LabelTokens(token_ids=ANSWERS, num_data=NUM_DATA)
    return MultipleChoice(num_data=NUM_DATA)


def loud(net):
    """Larger weights, so that a token misplaced shows."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return net


def make(likelihood):
    """The adapted network and a batch of six; the weights are large, so that the draws matter."""
    blora = adapted(
        loud(llama(1)),
        prior=KroneckerInducing(rank=2, sigma=1.0),
        guide=MatrixNormal(init_scale=0.4),
        likelihood=likelihood_of(likelihood),
    )
    tiny.shaken(blora.guide, 0.2)
    return blora, sequences(B) if likelihood == "LabelTokens" else choices(B)


def with_gradient(blora, loss):
    """The loss, then its gradient by the guide's parameters, as one vector."""
    gradients = torch.autograd.grad(loss, list(blora.guide.parameters()))
    return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in gradients)])


def statistics(blora, batch, kind, particles, copies, repeats):
    """Estimates with ``particles`` particles for a batch, each an average over ``copies`` of it."""
    elbo = tiny.elbo(copies * particles, kind)
    batch = repeat_batch(batch, copies)
    losses = (elbo.differentiable_loss(blora.model, blora.guide, batch) for _ in range(repeats))
    return torch.stack([with_gradient(blora, loss) for loss in losses])


def reference(blora, batch, draws, repeats):
    """The same by hand: every draw of the guide with every example, and the KL of torch."""
    results = []
    for _ in range(repeats):
        with pyro.plate("draws", draws, dim=-2):
            guide = pyro.poutine.trace(blora.guide).get_trace(batch)
            replayed = pyro.poutine.replay(blora.model.updates, trace=guide)
            model = pyro.poutine.trace(replayed).get_trace()
        kl = sum(
            kl_divergence(node["fn"], model.nodes[name]["fn"])[0].sum()
            for name, node in guide.nodes.items()
            if name.endswith(".V")
        )
        rows = repeat_batch(batch, draws)
        with blora.model.applied(model.nodes["_RETURN"]["value"]) as net:
            logits = blora.likelihood.logits(net, rows)
        nll = functional.cross_entropy(logits, rows["labels"])
        results.append(with_gradient(blora, NUM_DATA * nll + kl))
    return torch.stack(results)


def mean_and_error(values):
    return values.mean(0), values.std(0) / len(values) ** 0.5
