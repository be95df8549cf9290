"""A trained PEFT adapter, read to be the start of a Bayesian one."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.checkpoints.peft_source import read_source
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood, SequenceClassification
from pyro_blora.methods import Method
from pyro_blora.models import UpdateModel
from pyro_blora.network.pretrained import load_network, name_of_folder
from pyro_blora.network.targets import PEFT_PREFIX, layer_shape, matches
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.predictive import mean_updates

__all__ = ["PeftAdapter", "read_peft"]


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA, as PEFT keeps it.

    Attributes:
        factors: ``(B, A)`` by the layers' full names, the scaling within ``B``: ``dW = B A``.
        others: the other tensors by their full names: those of ``modules_to_save``.
        modules_to_save: the names, or their ends, of heads that were trained whole.
        base: what PEFT would load the base network by.
        task: PEFT's task type, or ``None``.
        where: what was read, for messages.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, Tensor]
    modules_to_save: Sequence[str]
    base: str | None
    task: str | None
    where: str

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(A) for _, A in self.factors.values())

    def load_base(self) -> nn.Module:
        """The base network by the name that the adapter has for it.

        Raises:
            ConfigurationError: there is no such name, or its kind of network is not known here.
        """
        classes = None
        if self.task == "SEQ_CLS":  # of a head's matrices, the last one's rows
            rows = [len(t) for t in self.others.values() if t.dim() == 2]
            classes = min(rows, default=None)
        if not self.base or (self.task != "CAUSAL_LM" and classes is None):
            raise ConfigurationError(
                f"{self.where} names the base {self.base!r} for the task {self.task}, which cannot "
                "be loaded by that alone; load the network and give it, from_peft(net, folder)."
            )
        return load_network(self.base, num_labels=classes)

    def options(
        self,
        net: nn.Module,
        method: str | Method | None,
        prior: UpdateModel | Mapping[str, UpdateModel] | None,
        guide: SiteGuide | Mapping[str, SiteGuide] | None,
        likelihood: Likelihood | None,
    ) -> dict[str, Any]:
        """The arguments of ``BayesianLoRA`` that start it at this adapter on ``net``.

        Raises:
            CheckpointError: ``net`` is not the base that the adapter was trained on.
            ConfigurationError: the guide is none of this library.
        """
        self._check_base(net)
        if not isinstance(guide, SiteGuide | Mapping | None):
            raise ConfigurationError(
                f"guide={guide!r} cannot start at a given adapter; take a family of "
                "pyro_blora.guides, such as MatrixNormal()."
            )
        if likelihood is None and self.task == "SEQ_CLS":
            likelihood = SequenceClassification()
        return {
            "target_modules": "|".join(map(re.escape, self.factors)),
            "method": method,
            "rank": self.rank if prior is None else None,
            "prior": prior,
            "guide": guide,
            "likelihood": likelihood,
            "modules_to_save": self._heads(net),
            "start": self.factors,
        }

    @torch.no_grad()
    def load_into(self, model: BayesianLoRAModel, guide: nn.Module) -> None:
        """Puts the trained heads in, and checks that the posterior mean is the adapter.

        Raises:
            ConfigurationError: it is not, for the guide spreads its start or knows its mean by
                draws alone.
        """
        for name, tensor in model.trained_heads.tensors().items():
            tensor.copy_(self.others[name])
        for group, update in mean_updates(model, guide).items():
            names = next(g.module_names for g in model.groups if g.name == group)
            for name, layer in zip(names, update.layers(), strict=True):
                B, A = (f.to(layer.A) for f in self.factors[name])
                probe = torch.randn(A.shape[1], 4, generator=torch.Generator().manual_seed(0)).to(A)
                core = layer.A @ probe if layer.core is None else layer.core @ (layer.A @ probe)
                found, expected = layer.B @ core, B @ (A @ probe)
                if (found - expected).norm() > 1e-4 * expected.norm() + 1e-6:
                    raise ConfigurationError(
                        f"{model.prior!r} with this guide has not its mean at the adapter in "
                        f"{name}; take a guide whose mean is a parameter: MatrixNormal, MeanField, "
                        "FullRank, LowRank, LayerCoupled, Delta, Laplace or Isotropic."
                    )

    def _heads(self, net: nn.Module) -> list[str]:
        modules = [n for n, _ in net.named_modules() if n and matches(n, self.modules_to_save)]
        return [n for n in modules if any(name.startswith(f"{n}.") for name in self.others)]

    def _check_base(self, net: nn.Module) -> None:
        if hasattr(net, "peft_config"):
            raise ConfigurationError(
                f"{type(net).__name__} has a PEFT adapter in it; give its base, as "
                "PeftModel.unload() returns it, or the PeftModel alone, from_peft(model)."
            )
        modules = dict(net.named_modules())
        for name, (B, A) in self.factors.items():
            wanted, found = (len(B), A.shape[1]), None
            if name in modules:
                found = layer_shape(modules[name])
            if found != wanted:
                what = f"has it as {found[0]} x {found[1]}" if found else "has no such linear layer"
                raise CheckpointError(
                    f"{self.where} is an adapter for {self.base or 'another network'!r} with "
                    f"{name} of {wanted[0]} x {wanted[1]}; {type(net).__name__} {what}. Load the "
                    "base it was trained on."
                )
        own, heads = net.state_dict(), tuple(f"{head}." for head in self._heads(net))
        missing = [name for name in own if name.startswith(heads) and name not in self.others]
        if missing:
            raise CheckpointError(
                f"{self.where} has a part of a trained head, without {missing[0]}; save it again."
            )
        for name, tensor in self.others.items():
            there = own.get(name.replace(".base_layer.", "."), torch.empty(0))
            fits = there.shape == tensor.shape
            if not name.startswith(heads):
                # PEFT writes embeddings along where a target is one of them; they are the base's
                fits = fits and (there.is_meta or torch.equal(there.cpu().to(tensor), tensor.cpu()))
            if not fits:
                raise CheckpointError(
                    f"{self.where} has {name} of {tuple(tensor.shape)} beside its LoRA, and "
                    f"{type(net).__name__} has it as {tuple(there.shape)}, or of other values: a "
                    "resized vocabulary, perhaps, or other classes. Give the base it was trained "
                    "on."
                )


def read_peft(source: str | os.PathLike[str] | nn.Module) -> PeftAdapter:
    """Reads a plain LoRA; nothing is unpickled, and no network is touched.

    Args:
        source: a ``peft.PeftModel`` with one active adapter, a folder that PEFT wrote, or the hub
            id of one.

    Returns:
        Its factors with all scalings in them: ``alpha / r``, ``alpha / sqrt(r)`` of rslora, and
        those of ``rank_pattern`` and ``alpha_pattern``; of a ``PeftModel`` the ones in force.

    Raises:
        CheckpointError: a file is missing, corrupt or no PEFT adapter.
        ConfigurationError: the adapter is no plain LoRA (another tuner, DoRA, trained biases, ...),
            or a ``PeftModel`` has several active or is merged.

    Example::

        read_peft("my_lora").factors["model.layers.0.self_attn.q_proj"]  # B: d_out x r, A: r x d_in
    """
    config, tensors, scales, where = read_source(source)
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(re.escape(PEFT_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if found and tensor.dim() == 2:
            pairs.setdefault(found[1], {})[found[2]] = tensor.detach()
        elif "lora_" in key or not key.startswith(PEFT_PREFIX):
            raise ConfigurationError(
                f"{where} has {key} of {tuple(tensor.shape)}, which a plain LoRA of linear layers "
                "has not; only such adapters can be a start."
            )
        else:
            others[key.removeprefix(PEFT_PREFIX)] = tensor.detach()
    if not pairs:
        raise CheckpointError(f"{where} has no lora_A and lora_B; is it a PEFT adapter?")
    factors = {}
    for name, pair in pairs.items():
        shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
        if pair.keys() != {"A", "B"} or shapes["B"][1] != shapes["A"][0]:
            raise CheckpointError(
                f"{where}: {name} has factors {shapes}, expected A (r, d_in) and B (d_out, r)."
            )
        scale = scales.get(name, _scaling(config, name, len(pair["A"])))
        factors[name] = pair["B"].float() * scale, pair["A"]
    task = config.get("task_type")
    return PeftAdapter(
        factors=factors,
        others=others,
        modules_to_save=config.get("modules_to_save") or (),
        base=name_of_folder(config.get("base_model_name_or_path") or "") or None,
        task=None if task is None else str(getattr(task, "value", task)),
        where=where,
    )


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    chosen = (a for key, a in alphas.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(chosen, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
