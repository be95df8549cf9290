"""The facade: a pretrained network, a prior, a guide and a likelihood, as one object."""

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import Self

from pyro_blora.checkpoints import checkpoint, peft
from pyro_blora.data.batches import batches_of, in_order, over_dataset, predict_dataset, shown
from pyro_blora.data.reading import reading
from pyro_blora.debts import enter_through
from pyro_blora.errors import BatchError, CheckpointError, ConfigurationError, check_kind
from pyro_blora.generation.generate import By, Generation, generate
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import (
    Batch,
    Collate,
    Likelihood,
    Preference,
    PreferenceCollator,
    usual_likelihood,
)
from pyro_blora.methods import Method, get_method
from pyro_blora.models import UpdateModel
from pyro_blora.network.adapter import heads_to_train
from pyro_blora.network.targets import find_targets, group_layers
from pyro_blora.posterior.bayesian_lora_model import LOCK, BayesianLoRAModel, one_at_a_time
from pyro_blora.posterior.guide import GuideFactory, analytic_kl, described, draws_apart, make_guide
from pyro_blora.posterior.posterior import Posterior, Samples
from pyro_blora.posterior.store import OwnTensors
from pyro_blora.posterior.temperature import calibrate, distill
from pyro_blora.prediction import Prediction
from pyro_blora.scores import Metrics


class BayesianLoRA(PyroModule):
    """A network whose low-rank updates are random, with a prior, a guide and a likelihood.

    The network is frozen and gets a hook on each target layer; :meth:`unwrap` restores it exactly.
    :attr:`model` and :attr:`guide` are ordinary Pyro callables of one argument, the batch. Prior,
    guide and likelihood are templates: the adapter binds a copy of each, and trains the copies.

    Args:
        net: a Hugging Face transformer, or any module with linear layers.
        target_modules: a list of name suffixes, a regular expression, ``"all-linear"``, or
            ``None`` for the usual attention projections. ``lm_head`` can be a target, tied or not.
        method: a name of :data:`pyro_blora.methods.METHODS`, a pair ``"Subspace+FullRank"``, or a
            :class:`~pyro_blora.methods.Method`: a prior, a guide, and how both are trained and
            predict. Default: ``"bayesian-lora"``. A ``prior=`` comes with its own learning rates.
        rank: the rank of the method's prior. Default: the method's own, usually 8.
        prior: p(U), and how the update follows from U; or a mapping to priors from names of layer
            groups or regular expressions: ``{"q_proj": Subspace(), ".*":
            KroneckerInducing()}``. Default: the method's, ``KroneckerInducing()``.
        guide: q(U): a guide family, or a mapping to families as for ``prior``, or a callable that
            makes a guide from the model, such as any ``pyro.infer.autoguide`` class. Default: the
            method's, ``MatrixNormal()``.
        likelihood: how logits become probabilities of labels. Default: by the network's head,
            such as ``CausalLM()``, ``SequenceClassification()`` or ``Regression()``.
        exclude_modules: suffixes or a regular expression of layers to leave alone.
        layers_to_transform: indices of the blocks to adapt. Default: all.
        modules_to_save: heads to train in full, as point estimates, as PEFT does. Default: with
            ``SequenceClassification`` the heads that contain no target.
        start: where the posterior mean starts: LoRA's ``(B, A)`` by the full name of each adapted
            layer, ``dW = B A``, of any ranks up to the prior's. Default: usually ``dW = 0``.
        tokenizer: reads rows of text for the likelihood if no ``collate`` is given; ``fit`` then
            accepts a file or a data frame as well. It can be set later.
        fast: whether to compute logits only at the positions needed, and pack options behind one
            question, neither of which changes the logits.

    Raises:
        ConfigurationError: no layer matches, a rank is too large or is passed along with a prior, a
            layer is already adapted, or the likelihood, a head or a key of a mapping does not match
            the network.

    Example::

        blora = BayesianLoRA(net, rank=4, likelihood=MultipleChoice(num_data=len(train)))
        fit(blora, train, collate=collate, num_steps=300)
        blora.predict(batch, num_samples=10).probs  # B x K
    """

    guide: Any

    @one_at_a_time
    def __init__(
        self,
        net: nn.Module,
        *,
        target_modules: str | Sequence[str] | None = None,
        method: str | Method | None = None,
        rank: int | None = None,
        prior: UpdateModel | Mapping[str, UpdateModel] | None = None,
        guide: SiteGuide | Mapping[str, SiteGuide] | GuideFactory | None = None,
        likelihood: Likelihood | None = None,
        exclude_modules: str | Sequence[str] = (),
        layers_to_transform: int | Sequence[int] | None = None,
        modules_to_save: Sequence[str] | None = None,
        start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        tokenizer: Any = None,
        fast: bool = True,
    ) -> None:
        super().__init__()
        enter_through(self, OwnTensors(self))  # in which all of its modules run
        targets = find_targets(net, target_modules, exclude_modules, layers_to_transform)
        known = get_method(method or "bayesian-lora")
        if prior is not None and rank is not None:
            raise ConfigurationError(f"rank must be None with prior=, got {rank}; set the prior's.")
        if prior is None:
            prior = (known if rank is None else known.with_rank(rank)).prior
        family = known.guide if guide is None else guide
        #: The prior, the guide, how both are trained and how they predict.
        self.method = replace(known, prior=prior, guide=family)
        self.tokenizer = tokenizer
        likelihood = usual_likelihood(net) if likelihood is None else likelihood
        check_kind("likelihood", likelihood, Likelihood)
        likelihood.check_network(net)
        heads = heads_to_train(net, modules_to_save, targets, likelihood.new_head)
        groups = group_layers(targets)
        self.model = BayesianLoRAModel(net, groups, prior, likelihood, heads, fast=fast)
        if likelihood.new_head and modules_to_save is not None and not heads:
            self.likelihood.keep_head(net)
        if start is not None:
            self.model.start_at(start)
        self.guide = make_guide(family, self.model)
        self.model.attach()
        super().train(net.training)  # so that train(training) changes nothing

    @property
    def net(self) -> nn.Module:
        """The wrapped network."""
        return self.model.net

    @property
    def prior(self) -> UpdateModel | Mapping[str, UpdateModel]:
        """The prior, or the priors by group, as passed."""
        return self.method.prior

    @property
    def max_plate_nesting(self) -> int:
        """The number of dimensions of the prior's plates, for an ELBO with vectorized particles."""
        return self.model.max_plate_nesting

    @property
    def likelihood(self) -> Likelihood:
        """The adapter's own copy of the likelihood, which is trained."""
        return self.model.likelihood

    @property
    def trainable_parameters(self) -> int:
        """The number of trained parameters; an AutoGuide creates its own at its first call."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def reading(
        self, data: Any, collate: Collate | None = None, **options: bool
    ) -> tuple[Any, Collate | None]:
        """The examples and their collator; see :func:`pyro_blora.data.reading.reading`."""
        return reading(data, collate, self.net, self.likelihood, self.tokenizer, **options)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the adapter and of the network; so does ``eval()``."""
        if self.model.adapters:  # otherwise the network belongs to another adapter
            self.net.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies ``to``, ``cuda``, ``half`` and the like to the network as well."""

        def moved(tensor: Tensor) -> Tensor:
            to = fn(tensor)  # in single precision at least, because Cholesky has no half
            kept = torch.promote_types(to.dtype, torch.float32)
            return tensor.to(to.device, kept) if tensor.is_floating_point() else to

        if self.model.adapters:
            self.net._apply(fn)
        return super()._apply(moved, recurse)

    @one_at_a_time
    def unwrap(self) -> nn.Module:
        """Removes the hooks and returns the network exactly as it was."""
        if self.model.adapters:  # otherwise the network may belong to another adapter
            self.model.detach()
        return self.net

    @property
    def posterior(self) -> Posterior:
        """q(U): its draws and its mean; called, a context in which the network runs under them."""
        return Posterior(self.model, self.guide, self.method)

    @one_at_a_time
    @torch.no_grad()
    def predict(
        self,
        batch: Any,
        num_samples: int | None = None,
        *,
        max_rows: int | None = None,
        linearized: bool | None = None,
        samples: Samples | None = None,
    ) -> Prediction:
        """The posterior predictive of the labels of a batch.

        Args:
            batch: a batch as in training, on any device; labels are not needed. With a tokenizer
                a list of texts for a classifier, or of rows, also works, however long it is.
            num_samples: number of posterior draws ``S``; 0 uses the posterior mean. Default: the
                method's, or 10.
            max_rows: limits memory: draws share a pass of the network as long as draws times
                examples do not exceed this number. Default: 256, fewer on a CPU.
            linearized: whether the draws come from the logits' first-order expansion at the center
                of the guide, which takes a forward pass and a backward one for each class but the
                first, however many draws there are. Default: the method's choice.
            samples: values of all sites, ``(S, *shape)`` by name, instead of draws from the guide:
                ``mcmc.get_samples()``, or the samples that Pyro's ``Predictive`` returns.

        Returns:
            Probabilities under every draw, ``S x B x K`` (``S = 1`` for the mean), or for numbers
            their distributions.

        Raises:
            ConfigurationError: the likelihood is of text, or ``samples`` are not of the sites.
            BatchError: the batch is not what the likelihood takes.
        """
        if not self.likelihood.predicts:
            raise ConfigurationError(
                f"predict must have a likelihood of labels, got {type(self.likelihood).__name__}"
                "; use log_predictive(batch), log_predictive_dataset(data), or generate(...)."
            )
        how: dict[str, Any] = {"linearized": linearized, "max_rows": max_rows, "samples": samples}
        if isinstance(batch, list):
            rows = [{"text": row} if isinstance(row, str) else row for row in batch]
            how |= {"precision": "float32", "progress": False}
            return self.predict_dataset(rows, None, num_samples, **how)[0]
        passes = self.posterior.logits(batch, num_samples, **how)
        return self.likelihood.predictive(torch.cat([*passes]))

    @one_at_a_time
    def distill(
        self,
        data: Any,
        collate: Collate | None = None,
        *,
        num_samples: int = 16,
        max_examples: int = 64,
        batch_size: int = 8,
        precision: str = "auto",
        progress: bool | None = None,
    ) -> float:
        r"""Makes one pass nearly as calibrated as the average of draws, without a label.

        The temperature of the posterior mean's scores becomes the one that minimizes

        .. math::
            \sum_i \mathrm{KL}\Bigl[\tfrac1S \textstyle\sum_s p(y \mid x_i, U_s) \,\Big\|\,
            \mathrm{softmax}\bigl(z(x_i) / T\bigr)\Bigr].

        It replaces the one that :meth:`calibrate` found for the mean, until another ``fit``; the
        network under ``posterior()`` does not use it. For text each ``x_i`` is the text before a
        token, and labels say which tokens are scored; others are ignored. ``max_examples`` of
        ``data`` are read: a fixed random choice, or the first ones of a ``DataLoader``.
        ``num_samples`` is ``S``; the other arguments are those of ``fit``.

        Returns:
            The temperature, between 0.01 and 100; above 1 if the mean was the more confident.

        Raises:
            ConfigurationError: all draws are equal, as those of ``Delta()`` are.

        Reference:
            H. Vejendla et al. (2025), arXiv:2505.11731, which trains a student on this divergence.

        Example::

            blora.distill(train, collate)
            blora.predict(batch, num_samples=0).probs  # one pass
        """
        data, collate = self.reading(data, collate, labeled=False, training=False)
        if not isinstance(data, DataLoader):
            chosen = random.Random(0).sample(range(len(data)), min(max_examples, len(data)))
            data = [data[i] for i in chosen]
        batches = shown("distill", batches_of(data, collate, batch_size), progress)
        with self.model.autocast(precision):
            return distill(self.posterior, batches, num_samples, max_examples)

    @one_at_a_time
    def calibrate(
        self,
        data: Any,
        collate: Collate | None = None,
        *,
        num_samples: int | None = None,
        batch_size: int = 8,
        precision: str = "auto",
        progress: bool | None = None,
    ) -> float:
        """Fits the temperatures of predictions to labels that the adapter has not learned from.

        One is for the average of draws, as ``predict`` makes it, and one for the posterior mean
        (see :func:`~pyro_blora.posterior.temperature.temperature_of_draws`). ``fit`` calls this at
        its end with the examples that it holds out, and resets both to 1 at its start; call it
        yourself after your own training loop. ``num_samples`` is as in ``predict``, and the other
        arguments are those of ``fit``.

        Returns:
            The temperature of the draws; above 1 if they were over-confident.

        Raises:
            ConfigurationError: the likelihood has no classes, or the adapter is off.

        Example::

            blora.calibrate(held_out, collate)
        """
        data, collate = self.reading(data, collate, training=False)
        batches = shown("calibrate", batches_of(data, collate, batch_size), progress)
        with self.model.autocast(precision):
            return calibrate(self.posterior, batches, num_samples)

    @one_at_a_time
    def predict_dataset(
        self,
        data: Any,
        collate: Collate | None = None,
        num_samples: int | None = None,
        *,
        linearized: bool | None = None,
        max_rows: int | None = None,
        samples: Samples | None = None,
        **options: Any,
    ) -> tuple[Prediction, Any]:
        """:meth:`predict` for a data set, and its labels; see :func:`pyro_blora.predict_dataset`.

        ``options`` are ``batch_size``, ``precision``, ``progress`` and ``description``.
        """
        data, collate = self.reading(data, collate, labeled=False, training=False)
        how: dict[str, Any] = {"linearized": linearized, "max_rows": max_rows, "samples": samples}
        predict = partial(self.predict, num_samples=num_samples, **how)
        place: dict[str, Any] = {"device": self.device, "labels_of": self.likelihood.labels}
        return predict_dataset(predict, data, collate, **place, **options)

    @one_at_a_time
    def evaluate(
        self,
        data: Any,
        collate: Collate | None = None,
        num_samples: int | None = None,
        **options: Any,
    ) -> Metrics:
        """The scores of predictions of labeled data, with arguments of :meth:`predict_dataset`.

        Example::

            print(blora.evaluate(test))  # accuracy, ECE and NLL, or RMSE, coverage and NLL
        """
        prediction, labels = self.predict_dataset(data, collate, num_samples, **options)
        if labels is None:
            raise BatchError("The examples must have labels to evaluate by, got none; add them.")
        self.likelihood.check_labels(labels, prediction.samples[0])
        return self.likelihood.metrics(prediction, labels)

    @one_at_a_time
    @torch.no_grad()
    def rewards(
        self,
        texts: Sequence[str | tuple[str, str]],
        num_samples: int | None = None,
        *,
        collate: PreferenceCollator | None = None,
    ) -> Tensor:
        """The rewards of texts under each draw, ``(S, n)``, by the likelihood ``Preference``.

        A text may be a pair of a prompt and its answer. The draws are the same for all texts and in
        each call, so a reward does not depend on which other texts there are. Preferences say
        nothing of where rewards are zero, so take their differences within each draw. The unit is
        that of log-odds, after the temperature.

        Example::

            rewards = blora.rewards([(prompt, answer) for answer in answers])
            gains = rewards - rewards[:, :1]  # over the first answer
            best = (gains.mean(0) - gains.std(0)).argmax()  # by a lower confidence bound
        """
        check_kind("texts", texts, list)
        collate = collate or (self.tokenizer and PreferenceCollator(self.tokenizer))
        if not isinstance(self.likelihood, Preference) or collate is None:
            raise ConfigurationError(
                "rewards must have the likelihood Preference and a tokenizer, got "
                f"{type(self.likelihood).__name__} and {type(self.tokenizer).__name__}."
            )
        self.method.check_draws()

        def scored(batch: Batch) -> tuple[Tensor, None]:
            with draws_apart(self.guide, self.device):  # one a pass, whatever the batch's size
                passes = [*self.posterior.logits(batch, num_samples, max_rows=1)]
            return torch.cat(passes).squeeze(-1).cpu(), None

        options: dict[str, Any] = {"precision": "float32", "progress": False}
        rows = collate.rows_of(texts)
        parts, _, back = over_dataset(scored, rows, collate, self.device, **options)
        return in_order(torch.cat(parts, 1), back, 1)

    @one_at_a_time
    @torch.no_grad()
    def log_predictive(
        self, batch: Batch, num_samples: int | None = None, **options: Any
    ) -> Tensor:
        """The log posterior predictive of the labels in nats, ``(B,)``; see :meth:`predict`."""
        return self.posterior.log_predictive(batch, num_samples, **options)

    @one_at_a_time
    def log_predictive_dataset(
        self,
        data: Any,
        collate: Collate | None = None,
        num_samples: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`log_predictive` for a data set, ``(n,)``, and counts of scored tokens, ``(n,)``.

        ``options`` are those of :meth:`predict_dataset`. A class counts as one token.

        Example::

            print(evaluate_text(*blora.log_predictive_dataset(answers)))  # NLL and perplexity
        """
        data, collate = self.reading(data, collate, training=False)

        def scored(batch: Batch) -> tuple[Tensor, Tensor]:
            batch = self.model.prepared(batch)  # once, because that synchronizes the device
            labels: Any = self.likelihood.labels(batch)  # without which log_predictive raises
            return self.log_predictive(batch, num_samples).cpu(), self.likelihood.num_scored(labels)

        log_probs, counts, back = over_dataset(scored, data, collate, self.device, **options)
        assert counts is not None
        return in_order(torch.cat(log_probs), back), counts

    @one_at_a_time
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        num_samples: int | None = None,
        abstain_above: float | None = None,
        by: By = "mutual_information",
        **options: Any,
    ) -> Generation:
        """Text from the average of posterior draws, with the uncertainty of each token.

        See :func:`pyro_blora.generation.generate`; ``options`` go to the network's ``generate``.
        """
        return generate(self.posterior, input_ids, num_samples, abstain_above, by, **options)

    @one_at_a_time
    def kl(self) -> Tensor | None:
        """KL[q(U) || p(U)] summed over all sites in nats, or ``None`` if it is not analytic."""
        return analytic_kl(self.guide, self.model)

    @one_at_a_time
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        result: checkpoint.Training | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> None:
        """Writes the adapter; see :func:`pyro_blora.checkpoints.save_pretrained`."""
        checkpoint.save_pretrained(self, self.posterior, folder, result=result, notes=notes)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the adapter; see :func:`pyro_blora.checkpoints.push_to_hub`."""
        return checkpoint.push_to_hub(self, self.posterior, repo_id, **options)

    @classmethod
    @one_at_a_time
    def from_pretrained(
        cls,
        net: nn.Module | str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        prior: UpdateModel | type[UpdateModel] | Mapping[str, UpdateModel] | None = None,
        guide: SiteGuide | type[SiteGuide] | Mapping[str, SiteGuide] | GuideFactory | None = None,
        likelihood: Likelihood | type[Likelihood] | None = None,
        trust_remote_code: bool = False,
        tokenizer: Any = None,
        fast: bool = True,
    ) -> Self:
        """Loads an adapter from its folder or its hub id onto its base network.

        ``from_pretrained(folder)`` also loads the base by its saved name and in its saved dtype.
        ``tokenizer`` and ``fast`` are as in the constructor; for the other arguments see
        :func:`pyro_blora.checkpoints.read_pretrained`.

        Raises:
            CheckpointError: the folder holds no adapter, or an adapter of another base.
        """
        base, place = (None, net) if folder is None else (net, folder)
        saved = checkpoint.read_pretrained(base, place, prior, guide, likelihood, trust_remote_code)
        blora = cls(saved.net, **saved.options, tokenizer=tokenizer, fast=fast)
        try:
            saved.load_into(blora.posterior)
        except CheckpointError:
            blora.unwrap()
            raise
        return blora

    @classmethod
    @one_at_a_time
    def from_peft(
        cls,
        net: nn.Module | str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        method: str | Method | None = None,
        prior: UpdateModel | Mapping[str, UpdateModel] | None = None,
        guide: SiteGuide | Mapping[str, SiteGuide] | None = None,
        likelihood: Likelihood | None = None,
        tokenizer: Any = None,
        fast: bool = True,
    ) -> Self:
        r"""Makes an adapter whose posterior mean starts at a trained LoRA.

        :math:`\mathbb{E}_q[\Delta W] = s B A` exactly, with PEFT's scaling :math:`s`, on the layers
        and with the heads that PEFT trained.

        Args:
            net: the base network. Default: loaded by its name in the adapter's files.
            folder: a folder that PEFT wrote, or a hub id. It can be the only argument,
                ``from_peft("my_lora")``, and so can a ``peft.PeftModel``, which is unloaded.
            method: as in the constructor.
            prior: a prior that can start there: ``KroneckerInducing``, ``FactorInducing``,
                ``GaussianFactors`` or ``Subspace``, of the adapter's rank or more. Default: the
                method's, of the adapter's rank.
            guide: a family whose mean is a parameter; it starts with the width ``init_scale``.
                Default: the method's.
            likelihood: as in the constructor. Default: by PEFT's task type.
            tokenizer: as in the constructor.
            fast: as in the constructor.

        Raises:
            CheckpointError: a file is missing or corrupt, or ``net`` is another base.
            ConfigurationError: the adapter is not a plain LoRA, or the prior or the guide cannot
                start there.

        Example::

            likelihood = MultipleChoice(num_data=len(train))
            blora = BayesianLoRA.from_peft("my_lora", likelihood=likelihood)
            fit(blora, train, collate=collate, num_steps=100)
        """
        make = partial(cls, method=method, tokenizer=tokenizer, fast=fast)
        blora: Self = peft.from_peft(make, net, folder, prior, guide, likelihood)
        if blora.method.held_out is None:  # the LoRA may have learned from all examples
            blora.method = replace(blora.method, held_out=0.0)
        return blora

    @one_at_a_time
    def export_peft(self, folder: str | os.PathLike[str], num_samples: int = 0) -> None:
        """Writes E[dW], or draws, for PEFT; see :func:`pyro_blora.checkpoints.export_peft`."""
        peft.export_peft(self.posterior, folder, num_samples)

    @one_at_a_time
    def merge_and_unload(self) -> nn.Module:
        """Merges E[dW] and the trained heads into the network, and returns the plain network."""
        return peft.merge_and_unload(self.posterior, self.unwrap)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the network as pretrained within the context, heads included; other threads wait."""
        with LOCK, self.model.disabled():
            yield

    @property
    def device(self) -> torch.device:
        """The device on which the network's adapted layers compute."""
        return self.model.groups[0].device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output under the posterior mean, which has no gradient for the adapter."""
        if self.training and torch.is_grad_enabled() and kwargs.get("labels") is not None:
            raise ConfigurationError(
                "The network under the posterior mean cannot be trained by its loss; call fit, use "
                "BayesianLoRATrainer or Pyro's SVI, or run blora.eval() if this is no training."
            )
        with self.posterior() as net:
            return net(*args, **kwargs)

    def __repr__(self) -> str:
        parts = described(self.model, self.guide, self.method, self.trainable_parameters)
        return "\n".join([f"BayesianLoRA({type(self.net).__name__})", *parts])
