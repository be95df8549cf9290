"""What an amortised guide sees of a batch."""

import math

import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import Batch

__all__ = [
    "DRAWS_PLATE",
    "ELBO_PLATE",
    "context_of_particles",
    "context_size",
    "open_plates",
    "pooled_context",
]

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
    """A vector for each example, ``(B, d)``: the batch's own ``context``, where it has one.

    Otherwise the mean of the input embeddings of its tokens, ``input_ids`` (B x ... x T), made
    ``sqrt(d)`` long.

    Raises:
        BatchError: the batch has neither.
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


def open_plates() -> dict[str, int]:
    """The names and sizes of the plates within which Pyro is running now."""
    plates = [m for m in _PYRO_STACK if isinstance(m, IndepMessenger) and m.dim is not None]
    return {plate.name: getattr(plate, "subsample_size", plate.size) for plate in plates}


def context_of_particles(context: Tensor) -> Tensor:
    """The context of each particle of the plates that are open, ``(P, d)`` of ``(B, d)``.

    Vectorised particles of an ELBO share out the examples, and each sees the mean over its own. A
    multiple of ``B`` draws for a prediction belongs to the examples one by one, over and over.
    Every other draw sees the mean over all examples, and there is but one.
    """
    plates, examples = open_plates(), context.shape[0]
    particles = math.prod(plates.values())
    if ELBO_PLATE in plates and examples % particles == 0:
        return context.reshape(particles, -1, context.shape[-1]).mean(1)
    if DRAWS_PLATE in plates and particles % examples == 0:
        return context.repeat(particles // examples, 1)
    return context.mean(0, keepdim=True)
