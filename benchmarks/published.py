"""The layers of other projects, which ``step_time.py`` runs from a checkout beside ours.

None of their code is copied here: each function imports or executes it from the checkout, and
returns the KL of all layers in nats, to be called once after each forward pass.
"""

import ast
import contextlib
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

KL = Callable[[], Tensor]


def _with_lora(net: nn.Module, targets: list[str], rank: int) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
    return get_peft_model(net, config)  # type: ignore[arg-type]


def bayesian_lora(net: nn.Module, targets: list[str], rank: int, checkout: Path) -> KL:
    """The code published with arXiv:2601.21003 (needs ``nflows``), at its own settings."""
    sys.path.insert(0, str(checkout))
    sys.modules["bnn.nn.nets"] = ModuleType(
        "bnn.nn.nets"
    )  # its image networks import further packages
    from bnn.bayesianize import bayesianize_  # type: ignore[import-not-found]

    settings = yaml.safe_load((checkout / "configs/inducing/inducing8.yaml").read_text())
    settings["key_layers"] = targets
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each layer
        bayesianize_(_with_lora(net, targets, rank), settings)
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
    wanted = {"blob_linear_forward", "div_posterior_prior"}
    body: list[Any] = [n for n in tree.body if getattr(n, "name", "") in wanted]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "BLoB":
            body += [n for n in node.body if getattr(n, "name", "") == "_wrap_lora_layer"]
    # the rest of the file imports the requirements of its command line
    space: dict[str, Any] = {"torch": torch, "nn": nn, "math": math, "Any": Any}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    _with_lora(net, targets, rank)
    layers = [m for m in net.modules() if isinstance(m, LoraLayer)]
    settings = SimpleNamespace(blobconfig=SimpleNamespace(bayes_eps=0.05, bayes_beta=0.2))
    for layer in layers:
        space["_wrap_lora_layer"](settings, layer)
        layer.forward = space["blob_linear_forward"].__get__(layer)  # type: ignore[method-assign]

    kl = space["div_posterior_prior"]
    return lambda: torch.stack([kl(layer) for layer in layers]).sum()
