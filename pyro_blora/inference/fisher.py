r"""Directions for a prior from the network's own gradients, before any training.

A low-rank update can only act within its directions. If they are learned by maximum likelihood,
they are half a million numbers without a KL; if they are drawn at random, they miss most of what
changes a prediction. The gradients at the pretrained weights show what does: with :math:`G_i =
\nabla_W \log p(y_i \mid x_i)`, for labels that the network itself draws so that no label of the
data is used, the top eigenvectors of

.. math::

    C_r = \tfrac1N \sum_i G_i G_i^\top, \qquad C_c = \tfrac1N \sum_i G_i^\top G_i

are the directions in which a layer's outputs and inputs change the prediction most.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides._site_guide import forked_rng
from pyro_blora.network.adapter import in_mode, updates_in_place
from pyro_blora.network.targets import LayerGroup
from pyro_blora.options import choose_precision
from pyro_blora.posterior.batches import Collate, batches_of, to_device
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time

_OVERSAMPLED = 8  # the columns of a sketch beyond the rank


def wants_informing(blora: BayesianLoRA) -> bool:
    """Whether a prior takes its directions from gradients and does not have them yet."""
    return any(not prior.informed for prior in _asking(blora))


def _asking(blora: BayesianLoRA) -> list[Any]:
    priors = [getattr(blora.model, group.name) for group in blora.model.groups]
    return [prior for prior in priors if prior.gradient_ranks is not None]


@one_at_a_time
def inform(
    blora: BayesianLoRA,
    data: Sequence[Any] | DataLoader[Any],
    *,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    num_examples: int = 512,
    batch_size: int = 8,
    precision: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> None:
    """Computes the directions of a prior that takes them from gradients (``FisherInducing``).

    :func:`~pyro_blora.inference.fit` calls this; call it yourself before a loop of your own. It
    makes one forward and backward pass over ``num_examples`` random examples, or the first ones of
    a ``DataLoader``, without using their labels. Other options are as in ``fit``. Each second
    moment is sketched by its products with ``m + 8`` random columns (a Nystroem approximation), so
    that no ``d x d`` matrix is formed.

    Reference:
        Halko, Martinsson, Tropp 2011, "Finding structure with randomness", arXiv:0909.4061,
        algorithm 5.5; Wang et al. 2024, "LoRA-GA", arXiv:2407.05000, starts a point estimate at
        the directions of gradients.
    """
    device = blora.model.groups[0].device
    generator = torch.Generator().manual_seed(seed)
    sketches = {
        name: _Sketch(prior.gradient_ranks, prior.group, generator)
        for prior in _asking(blora)
        for name in prior.group.module_names
    }
    probes = {name: _Probe(device) for name in sketches}
    updates = cast(Any, [probes.get(adapter.name) for adapter in blora.model.adapters])
    low = choose_precision(precision, device) == "bfloat16"
    if not isinstance(data, DataLoader):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        data = [data[i] for i in order[:num_examples].tolist()]
    seen = 0
    total = None if isinstance(data, DataLoader) else len(data)
    hide = None if progress is None else not progress
    bar = tqdm(total=total, desc="inform", disable=hide, unit="example")
    with bar, forked_rng(device), in_mode(blora.net, training=False), torch.enable_grad():
        torch.manual_seed(seed)
        for batch in batches_of(data, collate, length, batch_size):
            batch = to_device(batch, device)
            count = blora.likelihood.examples(batch)
            watched = updates_in_place(blora.model.adapters, updates)
            with watched, torch.autocast(device.type, torch.bfloat16, enabled=low):
                logits = blora.likelihood.logits(blora.net, batch)
            law = blora.likelihood.distribution(logits, blora.likelihood.labels(batch))
            gradients = torch.autograd.grad(
                law.log_prob(law.sample()).sum(), [probe.output for probe in probes.values()]
            )
            for (name, probe), gradient in zip(probes.items(), gradients, strict=True):
                sketches[name].add(_by_example(gradient, count), _by_example(probe.input, count))
            bar.update(count)
            seen += count
            if seen >= num_examples:
                break
    for prior in _asking(blora):
        factors = [sketches[name].factors() for name in prior.group.module_names]
        rows, columns = (torch.stack(side) for side in zip(*factors, strict=True))
        prior.inform(rows, columns)


class _Probe:
    """Takes the place of a layer's update to record its input and the gradient of its output."""

    input: Tensor
    output: Tensor

    def __init__(self, device: torch.device) -> None:
        self.A = torch.empty(0, device=device)  # an adapter reads an update's device from A

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        self.input, self.output = x.detach(), torch.zeros_like(output, requires_grad=True)
        return output + self.output


class _Sketch:
    """The top eigenvectors of both second moments of one layer's gradients, in one pass."""

    def __init__(
        self, ranks: tuple[int, int], group: LayerGroup, generator: torch.Generator
    ) -> None:
        self.ranks = ranks
        sides = zip((group.d_out, group.d_in), ranks, strict=True)
        self.random = [
            torch.randn(d, min(d, m + _OVERSAMPLED), generator=generator).to(group.device)
            for d, m in sides
        ]
        self.products = [torch.zeros_like(columns) for columns in self.random]

    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Adds ``B`` examples: ``G = gradient^T x`` with ``(B, T, d_out)`` and ``(B, T, d_in)``."""
        left, right = self.random
        device = left.device  # a group's layers may be on several devices
        gradient, x = gradient.to(device), x.to(device)
        self.products[0] += (gradient.mT @ (x @ (x.mT @ (gradient @ left)))).sum(0)
        self.products[1] += (x.mT @ (gradient @ (gradient.mT @ (x @ right)))).sum(0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``Z_r`` (m_r x d_out) and ``Z_c``: eigenvectors times the roots of their eigenvalues."""
        sides = zip(self.products, self.random, self.ranks, strict=True)
        factors = (_top(product, random)[:, :m].mT for product, random, m in sides)
        rows, columns = (Z / Z.square().sum(-1).mean().sqrt() for Z in factors)
        return rows, columns


def _top(product: Tensor, random: Tensor) -> Tensor:
    """``U sqrt(lambda)`` of the Nystroem approximation of ``C``; ``product`` is ``C random``."""
    Y, wide = product.double(), random.double()
    values, vectors = torch.linalg.eigh(wide.mT @ Y)
    least = len(values) * torch.finfo(product.dtype).eps * values[-1]
    inverse = values.clamp_min(least).rsqrt() * (values > least)  # smaller ones are rounding errors
    left, lengths, _ = torch.linalg.svd(Y @ vectors * inverse, full_matrices=False)
    return (left * lengths).to(product.dtype)


def _by_example(x: Tensor, count: int) -> Tensor:
    if x[..., 0].numel() % count:
        raise ConfigurationError(
            f"A layer's input must have rows of {count} examples, got {tuple(x.shape)}, as that of "
            "a router; take another prior."
        )
    return x.reshape(count, -1, x.shape[-1]).to(torch.get_default_dtype())
