"""PEFT's LoRA, trained by the same loop and scored by the same likelihood as everything else."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from pyro_blora.data.batches import Batches, predict_dataset
from pyro_blora.inference.learning_rates import RATES
from pyro_blora.inference.loop import FitResult, training_loop
from pyro_blora.likelihoods import Batch, Collate, Likelihood
from pyro_blora.network.adapter import Frozen, in_mode
from pyro_blora.network.targets import head_names
from pyro_blora.options import choose_precision
from pyro_blora.posterior.batches import to_device
from pyro_blora.posterior.prediction import Prediction
from pyro_blora.posterior.temperature import temperature_of_draws


class PlainLoRA:
    """A PEFT LoRA adapter by maximum likelihood, which predicts as a ``BayesianLoRA`` does.

    PEFT puts its layers into the network, and :meth:`unwrap` takes them out. Its ``lora_alpha`` is
    twice the rank, so that the update is ``2 B A``; a classifier's new head is trained, too. The
    ``dropout`` of the inputs of ``A`` is on in training, and in prediction if there are draws (Gal,
    Ghahramani 2016, arXiv:1506.02142).
    """

    def __init__(
        self,
        net: nn.Module,
        target_modules: Sequence[str],
        likelihood: Likelihood,
        *,
        rank: int,
        dropout: float = 0.0,
        layers_to_transform: Sequence[int] | None = None,
    ) -> None:
        self.net, self.likelihood = net, likelihood
        self.temperature = 1.0
        self.device = next(net.parameters()).device
        self._frozen = Frozen(net)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(target_modules),
            lora_dropout=dropout,
            layers_to_transform=layers_to_transform,
        )
        self._lora = LoraModel(net, config, "default")
        self.factors = [p for p in net.parameters() if p.requires_grad]
        heads = [net.get_submodule(name) for name in head_names(net) if likelihood.new_head]
        self.heads = [p.requires_grad_() for head in heads for p in head.parameters()]
        self._untrained = [p.detach().clone() for p in self.heads]
        self.trainable_parameters = sum(p.numel() for p in self.factors + self.heads)

    def unwrap(self) -> None:
        """Gives the network back as it was."""
        self._lora.unload()
        with torch.no_grad():
            for p, before in zip(self.heads, self._untrained, strict=True):
                p.copy_(before)
        vars(self.net).pop("peft_config", None)  # of an older PEFT
        self._frozen.thaw()

    def fit(self, train: Sequence[Any], collate: Collate, lr: float, **options: Any) -> FitResult:
        """Minimizes the negative log-likelihood; ``options`` are those of ``fit``."""
        usual = {"batch_size": 8, "seed": 0, "precision": "auto", "validate_every": 50}
        settings = {**usual, **options}
        torch.manual_seed(settings["seed"])
        autocast = choose_precision(settings["precision"], self.device) == "bfloat16"

        def loss_of(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            batch = to_device(batch, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                logits = self.likelihood.logits(self.net, batch)
            loss = nn.functional.cross_entropy(logits, batch["labels"])
            return loss, {"loss": loss.detach()}

        def check(batch: Batch, step: int, figures: dict[str, float]) -> None:
            if not math.isfinite(figures["loss"]):
                raise ArithmeticError(f"The loss of plain LoRA must be finite, got {figures}.")

        size, seed = settings["batch_size"], settings["seed"]
        stream = Batches(train, collate, batch_size=size, seed=seed)
        groups = [
            {"params": self.factors, "lr": lr},
            {"params": self.heads, "lr": self._head_rate(stream.peek())},
        ]
        with in_mode(self.net, training=True):
            return training_loop(loss_of, groups, stream, settings, check=check)

    @torch.no_grad()
    def _head_rate(self, batch: Batch) -> float:
        """That of the library's adapters, by the input of the last layer of the head."""
        sizes, own = [], {id(p) for p in self.heads}
        layers = [m for m in self.net.modules() if id(getattr(m, "weight", None)) in own]

        def note(_: nn.Module, given: tuple[Tensor]) -> None:
            sizes.append(float(given[0].abs().sum(-1).mean()))

        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        with in_mode(self.net, training=False):
            logits = self.likelihood.logits(self.net, to_device(batch, self.device))
        for handle in handles:
            handle.remove()
        return RATES["head"] * math.log2(logits.shape[-1]) ** 0.5 / max(sizes[-1:], default=1.0)

    @torch.no_grad()
    def predict(self, batch: Batch, num_samples: int = 0) -> Prediction:
        """The probabilities of a batch, ``S x B x K``; 0 draws are one pass without dropout."""
        batch = to_device(batch, self.device)
        with in_mode(self.net, training=False):
            for name, module in self.net.named_modules():
                if num_samples and ".lora_dropout." in name:
                    module.train()
            passes = [self.likelihood.logits(self.net, batch) for _ in range(max(1, num_samples))]
        return Prediction((torch.stack(passes) / self.temperature).softmax(-1))

    def calibrate(self, held_out: Sequence[Any], collate: Collate, num_samples: int) -> None:
        """Sets the temperature of the average of draws by labels, as a ``BayesianLoRA`` does."""
        found, labels = self.predict_dataset(held_out, collate, num_samples)
        self.temperature = temperature_of_draws(found.samples.clamp_min(1e-38).log(), labels)

    def predict_dataset(
        self, data: Sequence[Any], collate: Collate, num_samples: int, **options: Any
    ) -> tuple[Prediction, Tensor]:
        """The predictions of a data set and its labels, as by ``BayesianLoRA``."""
        options.pop("linearized", None)
        predict = partial(self.predict, num_samples=num_samples)
        return predict_dataset(predict, data, collate, device=self.device, **options)
