"""A trained LoRA in, a Bayesian adapter out: the post-hoc methods without any training."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Laplace
from pyro_blora.guides._post_hoc import PostHoc
from pyro_blora.inference.finish import finish
from pyro_blora.inference.loop import Collate
from pyro_blora.likelihoods import Likelihood
from pyro_blora.methods import Method, get_method
from pyro_blora.models import UpdateModel

__all__ = ["bayesianize"]


def bayesianize(
    net: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    data: Sequence[Any] | DataLoader[Any],
    collate: Collate | None = None,
    method: str | Method | None = None,
    prior: UpdateModel | None = None,
    guide: PostHoc | None = None,
    likelihood: Likelihood | None = None,
    length: Callable[[Any], int] | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> BayesianLoRA:
    """Gives a trained LoRA a posterior around it, in one pass over the data.

    The posterior mean is the LoRA. ``Laplace`` takes the width from the curvature of the loss
    there, one pass forward and one backward for each class but the first; ``Isotropic`` reads the
    data once, and then runs the network about ten times over it.

    Args:
        net: the base network, as in :meth:`~pyro_blora.BayesianLoRA.from_peft`.
        folder: what PEFT wrote, or a hub id; it or a ``PeftModel`` may stand alone.
        data: the training set for ``Laplace``, an anchor set for ``Isotropic``; examples, or a
            ``DataLoader`` of batches.
        collate: makes a batch of a list of examples.
        method: one with such a guide, ``"laplace-lora"`` or ``"tfb"``. Default: ``Laplace()`` with
            the prior ``KroneckerInducing`` of the adapter's rank.
        prior: as in ``from_peft``. Default: the method's.
        guide: ``Laplace`` or ``Isotropic``. Default: the method's.
        likelihood: one with classes. Default: by PEFT's task type.
        length: the length of an example; batches of like lengths waste no padding.
        batch_size: examples at once.
        precision: of the network, as in ``fit``.
        progress: whether to show a progress bar; ``None`` shows it on a terminal.

    Raises:
        ConfigurationError: the guide is none of these, or the likelihood has no classes; and as in
            ``from_peft``.
        CheckpointError: as in ``from_peft``.
        BatchError: there is no data.

    Reference:
        Yang et al. 2024, Laplace-LoRA, arXiv:2308.13111; Shi et al. 2024, Training-free
        Bayesianization, arXiv:2412.05723.

    Example::

        likelihood = MultipleChoice()
        blora = bayesianize(net, "my_lora", data=train, collate=collate, likelihood=likelihood)
        blora.predict(batch).probs  # B x K
    """
    made = get_method(method or "bayesian-lora") if not isinstance(method, Method) else method
    if guide is None:
        guide = cast(PostHoc, made.guide_of()) if method else Laplace()
    if not isinstance(guide, PostHoc):
        raise ConfigurationError(
            f"guide={guide!r} is trained; bayesianize takes Laplace() or Isotropic(). For others "
            "start by BayesianLoRA.from_peft and go on by fit."
        )
    if method is None:
        made = replace(made, linearised=isinstance(guide, Laplace))
    blora = BayesianLoRA.from_peft(
        net, folder, method=made, prior=prior, guide=guide, likelihood=likelihood
    )
    try:
        if not blora.likelihood.has_classes:
            raise ConfigurationError(
                f"{guide!r} needs one choice among a few classes for each example, and "
                f"{type(blora.likelihood).__name__} has none; pass likelihood=, such as "
                "MultipleChoice() or LabelTokens(token_ids=...)."
            )
        finish(
            blora,
            data,
            collate=collate,
            length=length,
            batch_size=batch_size,
            precision=precision,
            progress=progress,
        )
    except BaseException:
        blora.unwrap()
        raise
    return blora
