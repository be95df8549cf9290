"""LoRA with dropout as a prior, and the layers of other projects, executed from a checkout.

Each function returns the KL of all layers in nats, to be called once after each pass.
"""

import ast
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import dropout

from pyro_blora.models import GaussianFactors
from pyro_blora.updates import LowRankUpdate

KL = Callable[[], Tensor]


class Dropout(GaussianFactors):
    """LoRA with dropout on the inputs of ``A`` (Gal, Ghahramani 2016), as the update's noise."""

    def __init__(self, *, rank: int = 8, p: float = 0.1) -> None:
        super().__init__(rank=rank, random="both", sigma=1e4)

    def forward(self) -> LowRankUpdate:
        """LoRA's factors, and for each layer the noise of its dropout."""
        update = super().forward()
        noise = tuple(partial(self._noise, layer.A) for layer in update.layers())
        return replace(update, noise=noise)

    def _noise(self, A: Tensor, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        return (dropout(x, self.p) - x) @ A.to(x.dtype).mT @ B.to(x.dtype).mT


def peft(net: nn.Module, targets: list[str], rank: int, checkout: Path | None = None) -> KL:
    get_peft_model(net, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    return lambda: torch.zeros(())


def bayesian_lora(net: nn.Module, targets: list[str], rank: int, checkout: Path) -> KL:
    """The code published with arXiv:2601.21003 (needs ``nflows``), at its own settings."""
    sys.path.insert(0, str(checkout))
    sys.modules["bnn.nn.nets"] = ModuleType("nets")  # networks for images import further packages
    from bnn.bayesianize import bayesianize_

    settings = yaml.safe_load((checkout / "configs/inducing/inducing8.yaml").read_text())
    settings["key_layers"] = targets
    peft(net, targets, rank)
    bayesianize_(net, settings)
    layers = [m for m in net.modules() if hasattr(m, "kl_divergence")]

    def kl() -> Tensor:
        total = torch.stack([layer.kl_divergence() for layer in layers]).sum()
        for layer in layers:
            layer.reset_cache()  # before the next pass
        return total

    return kl


def blob(net: nn.Module, targets: list[str], rank: int, checkout: Path) -> KL:
    """BLoB's layers (arXiv:2406.11675), ``modelwrappers/blob.py``, at their own settings."""
    path = checkout / "modelwrappers" / "blob.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The rest of the file imports the requirements of its command line
    wanted = {"blob_linear_forward", "div_posterior_prior"}
    body: list[Any] = [n for n in tree.body if getattr(n, "name", "") in wanted]
    body += [n for n in ast.walk(tree) if getattr(n, "name", "") == "_wrap_lora_layer"]
    space: dict[str, Any] = {"torch": torch, "nn": nn, "math": math, "Any": Any}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    peft(net, targets, rank)
    layers = [m for m in net.modules() if isinstance(m, LoraLayer)]
    settings = SimpleNamespace(blobconfig=SimpleNamespace(bayes_eps=0.05, bayes_beta=0.2))
    for layer in layers:
        space["_wrap_lora_layer"](settings, layer)
        layer.forward = space["blob_linear_forward"].__get__(layer)
    kl = space["div_posterior_prior"]
    return lambda: torch.stack([kl(layer) for layer in layers]).sum()


LAYERS = {"peft": peft, "published": bayesian_lora, "blob_layers": blob}
