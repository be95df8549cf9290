"""PEFT's LoRA, trained by the same loop and scored by the same likelihood as everything else."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.inference.loop import FitResult, training_loop
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.network.adapter import Frozen, in_mode
from pyro_blora.network.precision import choose_precision
from pyro_blora.posterior.batches import Batches, Collate, to_device
from pyro_blora.posterior.prediction import Prediction


@dataclass
class PlainLoRA:
    """A PEFT LoRA adapter by maximum likelihood: the baseline.

    PEFT injects its layers in place, :meth:`unload` takes them out. Its ``lora_alpha`` is twice the
    rank, so that the update is ``2 B A``. ``dropout`` of the inputs of ``A`` is on in training, and
    in the draws of :meth:`predict`.
    """

    net: nn.Module
    target_modules: Sequence[str]
    likelihood: Likelihood
    rank: int = 8
    dropout: float = 0.0
    layers_to_transform: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._frozen = Frozen(self.net)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=list(self.target_modules),
            lora_dropout=self.dropout,
            layers_to_transform=self.layers_to_transform,
        )
        self._lora = LoraModel(self.net, config, "default")
        self.parameters = {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters.values())

    def unload(self) -> None:
        """Gives the network back as it was."""
        self._lora.unload()
        vars(self.net).pop("peft_config", None)  # of an older PEFT
        self._frozen.thaw()

    def fit(
        self,
        train: Sequence[Any],
        collate: Collate,
        *,
        num_steps: int,
        lr: float,
        batch_size: int = 8,
        length: Callable[[Any], int] | None = None,
        precision: str = "auto",
        seed: int = 0,
    ) -> FitResult:
        """Minimizes the negative log-likelihood; arguments as those of :func:`pyro_blora.fit`."""
        torch.manual_seed(seed)
        device = next(self.net.parameters()).device
        autocast = choose_precision(precision, device) == "bfloat16"

        def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            batch = to_device(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = self.likelihood.logits(self.net, batch)
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            return loss, {"loss": loss.detach(), "nll": loss.detach()}

        def check(batch: Batch, step: int, figures: dict[str, float]) -> None:
            if not math.isfinite(figures["loss"]):
                raise NonFiniteLossError(f"Plain LoRA's loss is not finite at step {step}.")

        with in_mode(self.net, training=True):
            return training_loop(
                loss_of,
                [{"params": list(self.parameters.values()), "lr": lr}],
                Batches(train, collate, length, batch_size=batch_size, seed=seed),
                num_steps=num_steps,
                check=check,
                description="lora",
            )

    @torch.no_grad()
    def predict(self, batch: Batch, num_samples: int = 0) -> Prediction:
        """The probabilities of a batch, ``S x B x K``.

        ``num_samples`` are passes with LoRA's own dropout on (Gal, Ghahramani 2016,
        arXiv:1506.02142); 0 makes one pass without.
        """
        batch = to_device(batch, next(self.net.parameters()).device)
        with in_mode(self.net, training=False):
            for name, module in self.net.named_modules():
                if num_samples and ".lora_dropout." in name:
                    module.train()
            passes = [self.likelihood.logits(self.net, batch) for _ in range(max(1, num_samples))]
        return Prediction(torch.stack(passes).softmax(-1))
