"""What an amortised guide sees of a batch."""

import pyro
import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import Batch

__all__ = ["DRAWS_PLATE", "ELBO_PLATE", "context_of_particles", "context_size", "pooled_context"]

# The name that Pyro's ELBO gives to the plate of vectorised particles.
ELBO_PLATE = "num_particles_vectorized"
# The plate of ``BayesianLoRA.sample_updates``.
DRAWS_PLATE = "posterior_samples"


def context_size(net: nn.Module) -> int:
    """Size of the network's input embeddings; 0 where it has none."""
    embeddings = getattr(net, "get_input_embeddings", lambda: None)()
    return 0 if embeddings is None else int(embeddings.weight.shape[-1])


@torch.no_grad()
def pooled_context(net: nn.Module, batch: Batch) -> Tensor:
    """One vector for each example: the mean of its tokens' input embeddings, of length ``sqrt(d)``.

    Args:
        net: the network.
        batch: ``input_ids`` (B x ... x T) and, where there is padding, ``attention_mask``; or
            ``context``, which is returned as it is.

    Returns:
        ``(B, d)``.

    Raises:
        BatchError: the batch has neither ``context`` nor ``input_ids``.
    """
    if "context" in batch:
        return batch["context"]
    if "input_ids" not in batch:
        raise BatchError(
            f"An amortised guide reads 'context' or 'input_ids', and the batch has {sorted(batch)}."
        )
    ids = batch["input_ids"]
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    weight = torch.ones_like(ids) if mask is None else mask
    if labels is not None and labels.shape == ids.shape:
        weight = weight * (labels == -100)  # tokens that are scored are not told beforehand
    embedded = net.get_input_embeddings()(ids)  # type: ignore[operator]
    embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
    dims = tuple(range(1, ids.dim()))
    mean = (embedded * weight.unsqueeze(-1)).sum(dims)  # its length is set below
    return nn.functional.normalize(mean, dim=-1) * float(mean.shape[-1]) ** 0.5


def context_of_particles(context: Tensor, nesting: int) -> Tensor:
    """The context of each particle of the plates that are open, ``(P, 1, ..., 1, d)``.

    Vectorised particles of an ELBO share out the examples, and each sees the mean over its own. A
    multiple of ``B`` draws for a prediction belongs to the examples one by one, over and over.
    Every other draw sees the mean over all examples.

    Args:
        context: of each example, ``(B, d)``.
        nesting: how many dimensions the plates of the prior take.

    Returns:
        With ``nesting`` dimensions of size one between ``P`` and ``d``; without ``P`` where no
        plate is open.
    """
    plates = [m for m in _PYRO_STACK if isinstance(m, IndepMessenger) and m.dim is not None]
    particles = 1
    for plate in plates:
        particles *= plate.size if not isinstance(plate, pyro.plate) else plate.subsample_size
    shares = any(plate.name == ELBO_PLATE for plate in plates)
    examples = context.shape[0]
    if shares and examples % particles == 0:
        context = context.reshape(particles, -1, context.shape[-1]).mean(1)
    elif any(plate.name == DRAWS_PLATE for plate in plates) and particles % examples == 0:
        context = context.repeat(particles // examples, 1)
    else:
        context = context.mean(0, keepdim=True)
    return context.reshape(context.shape[0], *(1,) * nesting, context.shape[-1])
