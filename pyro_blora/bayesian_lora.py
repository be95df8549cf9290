"""The facade: a pretrained network, a prior, a guide and a likelihood, as one object."""

import os
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
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.generation.generate import By, Generation, generate
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Batch, CausalLM, Likelihood, SequenceClassification
from pyro_blora.methods import METHODS, Method, get_method
from pyro_blora.models import UpdateModel
from pyro_blora.network.adapter import Frozen, heads_to_train
from pyro_blora.network.targets import find_targets, group_layers, is_classifier
from pyro_blora.options import check_count, check_kind
from pyro_blora.posterior import predictive
from pyro_blora.posterior.batches import Collate, to_device
from pyro_blora.posterior.bayesian_lora_model import LOCK, BayesianLoRAModel, one_at_a_time
from pyro_blora.posterior.guide import (
    GuideFactory,
    OwnTensors,
    analytic_kl,
    described_groups,
    make_guide,
    warn_of_a_point,
)
from pyro_blora.posterior.linearized import linearized_logits
from pyro_blora.posterior.one_pass import distill
from pyro_blora.posterior.prediction import Prediction, predict_dataset
from pyro_blora.updates.low_rank_update import LowRankUpdate

# What transformers asks of a network besides, a pipeline for one
_PROXIED = {"dtype", "generation_config", "can_generate", "input_modalities", "output_modalities"}


class BayesianLoRA(PyroModule):
    """A network whose low-rank updates are random, with a prior, a guide and a likelihood.

    The network is frozen and gets a hook on each target layer; :meth:`unwrap` gives it back
    exactly. :attr:`model` and :attr:`guide` are ordinary Pyro callables of one argument, the batch.

    Args:
        net: a Hugging Face transformer, or any module with linear layers.
        target_modules: a list of name suffixes, a regular expression, ``"all-linear"``, or
            ``None`` for the usual attention projections. ``lm_head`` may be one, tied or not.
        method: a name of :data:`pyro_blora.methods.METHODS`, a pair ``"Subspace+FullRank"``, or a
            :class:`~pyro_blora.methods.Method`: a prior, a guide, and how both are trained and
            predict. Default: ``"bayesian-lora"``; a prior that is given brings rates of its own.
        rank: of the method's prior. Default: the method's own, mostly 8.
        prior: what p(U) is and how the update follows; or a mapping of them, by the names of groups
            of layers or regular expressions: ``{"q_proj": Subspace(), ".*": KroneckerInducing()}``.
            Default: the method's, ``KroneckerInducing()``.
        guide: what q(U) is: a guide family or a mapping of them likewise, or a callable that makes
            a guide from the model, such as any ``pyro.infer.autoguide`` class. Default: the
            method's, ``MatrixNormal()``.
        likelihood: how the logits explain a batch; :func:`~pyro_blora.inference.fit` wants its
            ``num_data``. Default: ``CausalLM()``, for a classifier ``SequenceClassification()``.
        exclude_modules: suffixes or a regular expression of layers to leave alone.
        layers_to_transform: indices of the blocks to adapt. Default: all.
        modules_to_save: heads to train whole, as points, as PEFT does. Default: under
            ``SequenceClassification`` those that hold no target.
        start: where the posterior mean begins: LoRA's ``(B, A)`` by the full name of each adapted
            layer, ``dW = B A``, of any ranks up to the prior's. :meth:`from_peft` takes those of a
            trained adapter. Default: where the prior says, mostly at ``dW = 0``.
        fast: whether to take the shortcuts that give the network's own logits: logits at the
            positions read, options packed behind one question, frozen blocks run once.

    Raises:
        NoTargetError: no layer matches.
        ConfigurationError: a rank is too large or beside a prior, or a layer is adapted already.
            Or the likelihood, a head or a key of a mapping does not match the network.

    Reference:
        Bayesian-LoRA, arXiv:2601.21003.

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
        fast: bool = True,
    ) -> None:
        super().__init__()
        self._pyro_context = OwnTensors(self)
        which: dict[str, Any] = {"exclude_modules": exclude_modules}
        which["layers_to_transform"] = layers_to_transform
        targets = find_targets(net, target_modules, **which)
        if method is None:
            draws = 0 if getattr(guide, "is_point", False) else None
            method = replace(METHODS["bayesian-lora"], num_samples=draws)
        #: How it is trained and predicts: a method's record.
        self.method = get_method(method) if isinstance(method, str) else method
        if prior is None:
            prior = self.method.prior_of(rank)
        elif rank is not None:
            raise ConfigurationError(
                f"rank must be None with prior=, got {rank}; give it to prior."
            )
        family = self.method.guide_of() if guide is None else guide
        self._given = (net, family)  # in a tuple, so that nn.Module does not register them
        if likelihood is None:
            likelihood = SequenceClassification() if is_classifier(net) else CausalLM()
        check_kind("likelihood", likelihood, Likelihood)
        likelihood.check_network(net)
        heads = heads_to_train(net, modules_to_save, targets, likelihood.new_head)
        self.model = BayesianLoRAModel(net, group_layers(targets), prior, likelihood, heads)
        if start is not None:
            self.model.start_at(start)
        self.guide = make_guide(family, self.model)
        self.model.attach()
        self._frozen = Frozen(net)
        super().train(net.training)  # so that train(training) changes nothing
        self.likelihood.shortcuts.on = fast

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name) if name in _PROXIED else super().__getattr__(name)

    @property
    def net(self) -> nn.Module:
        """The wrapped network."""
        return self._given[0]

    @property
    def prior(self) -> UpdateModel | Mapping[str, UpdateModel]:
        """The prior, or those by group, as given."""
        return self.model.prior

    @property
    def guide_family(self) -> SiteGuide | Mapping[str, SiteGuide] | GuideFactory:
        """The guide family, those by group, or what made the guide, as given."""
        return self._given[1]

    @property
    def max_plate_nesting(self) -> int:
        """How many dimensions the plates of the prior take, for an ELBO of vectorized particles."""
        return self.model.max_plate_nesting

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood."""
        return self.model.likelihood

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained; an AutoGuide has its own from its first call on."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Puts the network into this mode, too, and so does ``eval()``."""
        if self.model.adapters:  # otherwise the network belongs to another adapter
            self.net.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to``, ``cuda``, ``half`` and the like move the network, too."""

        def moved(tensor: Tensor) -> Tensor:
            to = fn(tensor)  # in single precision at least: a Cholesky factor has no half
            kept = torch.promote_types(to.dtype, torch.float32)
            return tensor.to(to.device, kept) if tensor.is_floating_point() else to

        if self.model.adapters:
            self.net._apply(fn)
        return super()._apply(moved, recurse)

    @one_at_a_time
    def unwrap(self) -> nn.Module:
        """Takes the hooks off and gives the network back exactly as it was."""
        if self.model.adapters:  # else the network may be another one's by now
            self.model.detach()
            self._frozen.thaw()
        return self.net

    @one_at_a_time
    def sample_updates(
        self,
        num_samples: int = 0,
        batch: Batch | None = None,
        *,
        samples: predictive.Samples | None = None,
    ) -> dict[str, LowRankUpdate]:
        """Posterior draws of the updates by group, 0 for their mean; or those at ``samples``."""
        if samples is not None:
            number, draw = predictive.draws_given(self.model, samples)
            return draw(number)
        return predictive.sample_updates(self.model, self.guide, num_samples, batch)

    @contextmanager
    def posterior(self, num_samples: int = 0, batch: Batch | None = None) -> Iterator[nn.Module]:
        """Gives the network, which within runs under draws of U, or with 0 under the mean.

        ``num_samples`` draws share out the rows of whatever batch it gets. Conditional noise is
        drawn anew at every call of a layer; the mean has none. A posterior that depends on the
        input is that of ``batch``. Other threads wait.
        """
        with LOCK:
            self.model.check_on_network()
            with self.model.applied(self.sample_updates(num_samples, batch)) as net:
                yield net

    @one_at_a_time
    @torch.no_grad()
    def predict(
        self,
        batch: Batch,
        num_samples: int | None = None,
        *,
        max_rows: int | None = None,
        linearized: bool | None = None,
        samples: predictive.Samples | None = None,
    ) -> Prediction:
        """The posterior predictive of the labels of a batch.

        Args:
            batch: as in training, on any device; labels are not needed.
            num_samples: number of posterior draws ``S``; 0 uses the posterior mean. Default: the
                method's, or 10.
            max_rows: as many draws share a pass of the network as keep draws times examples within
                this, at least one; a limit on memory. Default: 256, less on a CPU.
            linearized: takes the draws from the logits' first-order expansion at the center of
                the guide: one pass however many draws. Default: what the method does.
            samples: values of all sites, ``(S, *shape)`` by name, instead of draws of the guide:
                ``mcmc.get_samples()``, or what Pyro's ``Predictive`` of another guide gives.
                Heads and the likelihood's parameters stay as they are.

        Returns:
            Probabilities for every draw, ``S x B x K`` (``S = 1`` for the mean).

        Raises:
            ConfigurationError: the likelihood has no classes (``CausalLM``; use
                :meth:`log_predictive`), or ``samples`` are not those of the sites.
            BatchError: the batch is not what the likelihood takes.
        """
        if not self.likelihood.has_classes:
            raise ConfigurationError(
                f"predict must have a likelihood with classes, got {type(self.likelihood).__name__}"
                "; use log_predictive(batch), or blora.generate(...)."
            )
        passes = self._logits(batch, num_samples, max_rows, linearized, samples)
        return Prediction(torch.cat([logits.softmax(-1) for logits in passes]))

    def _logits(
        self,
        batch: Batch,
        num_samples: int | None = None,
        max_rows: int | None = None,
        linearized: bool | None = None,
        samples: predictive.Samples | None = None,
    ) -> Iterator[Tensor]:
        """The logits of :meth:`predict` before its softmax, ``(draws, B, ..., C)`` a pass."""
        num_samples = self._draws(num_samples)
        if linearized is None:
            linearized = self.method.linearized and samples is None and num_samples > 0
        if samples is not None and linearized:
            raise ConfigurationError(
                "linearized must be False with samples=, got True; leave one of them out."
            )
        if samples is None:
            warn_of_a_point(self.model, self.guide, num_samples)
        batch, parts = to_device(batch, self.device), (self.model, self.guide)
        if linearized:
            return iter([linearized_logits(*parts, batch, num_samples)])
        return predictive.logits_of_draws(*parts, batch, num_samples, max_rows, samples)

    @one_at_a_time
    def distill(
        self,
        data: Sequence[Any] | DataLoader[Any],
        collate: Collate | None = None,
        num_samples: int = 16,
        **options: Any,
    ) -> float:
        r"""Makes one pass nearly as calibrated as the average of draws, without a label.

        The temperature of the posterior mean's scores becomes the one that minimizes

        .. math::
            \sum_i \mathrm{KL}\Bigl[\tfrac1S \textstyle\sum_s p(y \mid x_i, U_s) \,\Big\|\,
            \mathrm{softmax}\bigl(z(x_i) / T\bigr)\Bigr].

        ``predict(batch, 0)``, ``generate(num_samples=0)``, the saved adapter and its export use it
        from then on; the network under :meth:`posterior` does not. A further ``fit`` begins again
        at 1. For text each ``x_i`` is what stands before a token.

        Args:
            data: inputs, such as the training set; examples, or a ``DataLoader``. Labels are not
                read, but for text they say which tokens are scored.
            collate: makes a batch of a list of examples, torch's by default.
            num_samples: posterior draws ``S``.
            options: ``max_examples``, how many are read, a fixed random choice, or the first of a
                ``DataLoader``; by default 64. ``length``, ``batch_size``, ``precision`` and
                ``progress`` are as in ``fit``.

        Returns:
            The temperature, between 0.01 and 100; above 1 if the mean was surer than the draws.

        Raises:
            ConfigurationError: all draws are alike, as those of ``Delta()`` are.

        Reference:
            H. Vejendla et al. (2025), arXiv:2505.11731, which trains a student on this divergence.

        Example::

            blora.distill(train, collate)
            blora.predict(batch, num_samples=0).probs  # one pass
        """
        options |= {"collate": collate, "num_samples": num_samples}
        linearized = self.method.linearized
        return distill(self.model, self.guide, data, linearized=linearized, **options)

    def predict_dataset(
        self,
        data: Sequence[Any],
        collate: Collate,
        num_samples: int | None = None,
        *,
        linearized: bool | None = None,
        **options: Any,
    ) -> tuple[Prediction, Tensor]:
        """:meth:`predict` for a data set, and its labels; see :func:`pyro_blora.predict_dataset`.

        ``options`` are ``batch_size``, ``length``, ``precision``, ``progress`` and ``description``.
        """
        predict = partial(self.predict, num_samples=num_samples, linearized=linearized)
        return predict_dataset(predict, data, collate, device=self.device, **options)

    @one_at_a_time
    @torch.no_grad()
    def log_predictive(
        self,
        batch: Batch,
        num_samples: int | None = None,
        *,
        max_rows: int | None = None,
        linearized: bool | None = None,
        samples: predictive.Samples | None = None,
    ) -> Tensor:
        """The log posterior predictive of the labels in nats, ``(B,)``; as in :meth:`predict`."""
        batch = to_device(batch, self.device)
        self.likelihood.examples(batch)
        passes = self._logits(batch, num_samples, max_rows, linearized, samples)
        return predictive.log_predictive(self.likelihood, batch, passes)

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

        See :func:`pyro_blora.generation.generate`; ``options`` are those of the network's own.
        """
        draws = self._draws(num_samples)
        if draws:
            self.check_draws()
        return generate(self.model, self.guide, input_ids, draws, abstain_above, by, **options)

    def _draws(self, num_samples: int | None) -> int:
        if num_samples is None:
            num_samples = 10 if self.method.num_samples is None else self.method.num_samples
        check_count("num_samples", num_samples, 0)
        return num_samples

    def check_draws(self) -> None:
        """Raises ConfigurationError where networks under draws are not what the method predicts."""
        if self.method.linearized:
            raise ConfigurationError(
                f"The method {self.method.name!r} averages draws of linearized logits, which are "
                "those of no network: take num_samples=0, the mean, or a method with "
                "linearized=False."
            )

    @one_at_a_time
    def kl(self) -> Tensor | None:
        """KL[q(U) || p(U)] summed over all sites in nats, or ``None`` if it is not analytic."""
        return analytic_kl(self.guide, self.model)

    @one_at_a_time
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        result: Any = None,
        notes: Mapping[str, object] | None = None,
    ) -> None:
        """Writes the adapter; see :func:`pyro_blora.checkpoints.save_pretrained`."""
        checkpoint.save_pretrained(self, folder, result=result, notes=notes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "A Bayesian LoRA adapter",
        **about: Any,
    ) -> str:
        """:meth:`save_pretrained` to ``"user/name"`` on the hub; gives the commit's address."""
        return checkpoint.push_to_hub(self, repo_id, private, commit_message, **about)

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
        fast: bool = True,
    ) -> Self:
        """An adapter from its folder or its hub id, on its base.

        ``from_pretrained(net, folder)`` puts it on a network at hand, ``from_pretrained(folder)``
        loads the base by its saved name, in the dtype in which it was. ``fast`` is the
        constructor's; for all else see :func:`pyro_blora.checkpoints.read_pretrained`.

        Raises:
            CheckpointError: the folder is no adapter's, or is one for another base.

        Example::

            blora = BayesianLoRA.from_pretrained("me/my-adapter")
            blora.predict(batch, num_samples=10).probs  # B x K
        """
        parts: dict[str, Any] = {"prior": prior, "guide": guide, "likelihood": likelihood}
        base, place = (None, net) if folder is None else (net, folder)
        saved = checkpoint.read_pretrained(
            base, place, trust_remote_code=trust_remote_code, **parts
        )
        blora = cls(saved.net, **saved.options, fast=fast)
        try:
            saved.load_into(blora)
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
        fast: bool = True,
    ) -> Self:
        r"""An adapter whose posterior mean is a trained LoRA, to go on from.

        :math:`\mathbb{E}_q[\Delta W] = s B A` exactly, with PEFT's scaling :math:`s`, on the layers
        and with the heads that PEFT trained. A layer of a rank below the prior's has its further
        directions at zero. LoRA's dropout is not taken over.

        Args:
            net: the base network. Default: loaded by the name that the adapter has for it.
            folder: what PEFT wrote, or a hub id. It stands alone, ``from_peft("my_lora")``, and so
                does a ``peft.PeftModel``, ``from_peft(peft_model)``, which is unloaded.
            method: as in the constructor.
            prior: one that can start there: ``KroneckerInducing``, ``FactorInducing``,
                ``GaussianFactors`` or ``Subspace``, of the adapter's rank or more. Default: the
                method's, of the adapter's rank.
            guide: a family whose mean is a parameter. Its width at the start is ``init_scale`` of
                the prior's. Default: the method's.
            likelihood: as in the constructor. Default: by PEFT's task type.
            fast: as in the constructor.

        Raises:
            CheckpointError: a file is missing or corrupt, or ``net`` is another base.
            ConfigurationError: it is no plain LoRA, or the prior or the guide cannot start there.

        Example::

            likelihood = MultipleChoice(num_data=len(train))
            blora = BayesianLoRA.from_peft("my_lora", likelihood=likelihood)
            fit(blora, train, collate=collate, num_steps=100)
        """
        parts: dict[str, Any] = {"prior": prior, "guide": guide, "likelihood": likelihood}
        return peft.from_peft(partial(cls, method=method, fast=fast), net, folder, **parts)

    @one_at_a_time
    def export_peft(self, folder: str | os.PathLike[str], num_samples: int = 0) -> None:
        """Writes E[dW], or draws, for PEFT; see :func:`pyro_blora.checkpoints.export_peft`."""
        peft.export_peft(self, folder, num_samples)

    @one_at_a_time
    def merge_and_unload(self) -> nn.Module:
        """The network with E[dW] and the trained heads in its weights; the posterior is gone."""
        return peft.merge_and_unload(self)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the network runs as it was, with its own heads; other threads wait."""
        model = self.model
        with LOCK:
            before, model.enabled = model.enabled, False
            try:
                yield
            finally:
                model.enabled = before

    def print_trainable_parameters(self) -> None:
        """Prints how many numbers are trained, in PEFT's words."""
        trained: int = self.trainable_parameters
        both = trained + sum(p.numel() for p in self.net.parameters())
        print(
            f"trainable params: {trained:,d} || all params: {both:,d} || "
            f"trainable%: {100 * trained / both:.4f}"
        )

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.net.config

    @property
    def device(self) -> torch.device:
        """Where the network's adapted layers compute."""
        return self.model.groups[0].device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network puts out under the posterior mean."""
        with self.posterior(batch=kwargs) as net:
            return net(*args, **kwargs)

    def __repr__(self) -> str:
        family = self.guide_family
        lines = [
            f"BayesianLoRA({type(self.net).__name__})",
            f"  prior:      {self.prior!r}",
            f"  guide:      {getattr(family, '__name__', repr(family))}",
            f"  likelihood: {self.likelihood!r}",
            *described_groups(self.model, self.guide, self.trainable_parameters),
        ]
        if (temperature := float(self.model.temperature)) != 1:
            lines.append(f"  one pass:   temperature {temperature:.3g}, distilled from draws")
        return "\n".join(lines)
