"""Time of a training step of each method, interleaved step by step in one process.

    python benchmarks/step_time.py                               # SmolLM2-135M's shape, float32
    python benchmarks/step_time.py --size tiny --methods peft,bayesian-lora,blob
    python benchmarks/step_time.py --published CHECKOUT --blob CHECKOUT  # other projects' layers
    python benchmarks/step_time.py --top 10 --methods peft,bayesian-lora

Every method adapts q and v of all blocks (or of the top ones) at rank 8 of a random network, with
the same batches, optimizer (AdamW) and gradient clipping. `peft` and the layers of other projects
run the network as their scripts do, `net(**batch).logits[:, -1, answers]`; `peft:read`,
`published:read` and so on run the same layers as this library does, and compute only the logits
that a likelihood reads. A ratio is that of two steps of the same round; the table has its median
and quartiles. Peak memory is measured in a separate process for each method.
"""

import copy
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import published
import pyro
import torch
from plain_lora import PlainLoRA
from pyro.infer import TraceMeanField_ELBO
from timing import (
    ANSWERS,
    RANK,
    ROWS,
    TARGETS,
    adapted,
    batch_of,
    network,
    parser_of,
    table,
    take_turns,
)
from torch import Tensor, nn

from pyro_blora.inference import parameter_groups
from pyro_blora.likelihoods import LabelTokens

Batch = dict[str, Tensor]
RATES = {"mean": 1e-3, "scale": 1e-3, "direction": 1e-3}


class HandWritten(nn.Module):
    """A layer with mean-field noise on A and nothing else: the least that VI by hand can be."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.mean = nn.Parameter(torch.randn(RANK, base.in_features) * base.in_features**-0.5)
        self.rho = nn.Parameter(torch.full_like(self.mean, -4.0))
        self.B = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """One draw of A for the whole batch."""
        A = self.mean + self.rho.exp() * torch.randn_like(self.mean)
        return self.base(x) + (x @ A.mT) @ self.B.mT  # type: ignore[no-any-return]

    def kl(self) -> Tensor:
        """The KL from a normal prior with standard deviation 0.2."""
        variance = (2 * self.rho).exp()
        return ((variance + self.mean.square()) / 0.08 - self.rho - 0.5).sum()


def other_layers(method: str, net: nn.Module, options: Namespace) -> Callable[[], Tensor]:
    """Puts the layers of a method into the network; their KL, called once after each pass."""
    if method == "published":
        return published.bayesian_lora(net, TARGETS, RANK, options.published)
    if method == "published-blob":
        return published.blob(net, TARGETS, RANK, options.blob)
    if method == "peft":
        PlainLoRA(net, TARGETS, LabelTokens(token_ids=ANSWERS), rank=RANK)
        return lambda: torch.zeros(())
    net.requires_grad_(False)
    names = [n for n, _ in net.named_modules() if n.rsplit(".", 1)[-1] in TARGETS]
    layers = [HandWritten(net.get_submodule(name)) for name in names]  # type: ignore[arg-type]
    for name, layer in zip(names, layers, strict=True):
        net.set_submodule(name, layer)
    return lambda: torch.stack([layer.kl() for layer in layers]).sum()


def step_of(method: str, net: nn.Module, options: Namespace) -> Callable[[Batch], None]:
    """The training step of a method, as in :func:`pyro_blora.fit` without its loop."""
    likelihood = LabelTokens(token_ids=ANSWERS, num_data=1000)
    layers, _, how = method.partition(":")
    precision: Callable[[], Any] = nullcontext
    if layers in ("peft", "hand-written", "published", "published-blob"):
        kl = other_layers(layers, net, options)
        groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": 1e-3}]

        def loss_of(batch: Batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                if how == "read":
                    logits = likelihood.logits(net, batch)
                else:
                    inputs = {key: batch[key] for key in likelihood.keys}
                    logits = net(**inputs, use_cache=False).logits[:, -1, list(ANSWERS)]
            return nn.functional.cross_entropy(logits.float(), batch["labels"]) + kl() / 1000

    else:
        blora = adapted(net, method, likelihood, options.top)
        groups = parameter_groups(blora, RATES)
        precision = partial(blora.model.autocast, options.precision)
        nesting = blora.max_plate_nesting
        bound = TraceMeanField_ELBO(ROWS, nesting, vectorize_particles=True)
        elbo = bound(blora.model, blora.guide)

        def loss_of(batch: Batch) -> Tensor:
            return elbo(batch) / 1000

    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with precision():
            loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def timed(options: Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each step of each method, in turn."""
    base = network(options.size, options.layers).train()
    batch, steps = batch_of(), {}
    for name in names:
        net = base if len(names) == 1 else copy.deepcopy(base)
        if options.checkpoint:
            older = net.gradient_checkpointing_enable  # before transformers 5.24
            getattr(net, "activation_checkpointing_enable", older)({"use_reentrant": False})
        if options.compile:
            net.model.compile(dynamic=False)
        steps[name] = partial(step_of(name, net, options), batch)
    with pyro.validation_enabled(False):
        return take_turns(steps, options.steps, warmup=3)


def peak(method: str) -> float:
    """Peak memory in GiB of three steps of a method, in a process with the same options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, help="number of layers; default: the shape's own")
    parser.add_argument(
        "--methods",
        default="peft,peft:read,bayesian-lora,mean-field,blob,hand-written:read",
        help="peft and hand-written, also with :read; any method or PRIOR+GUIDE; and "
        "bayesian-lora:scaled, with conditional noise",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network's body")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing")
    parser.add_argument("--published", type=Path, help="checkout of arXiv:2601.21003's code")
    parser.add_argument("--blob", type=Path, help="checkout of BLoB's code, arXiv:2406.11675")
    parser.add_argument("--peak-of", help="print the peak memory of this method alone")
    options = parser.parse_args()
    if options.peak_of:
        options.steps = 0  # the warm-up alone
        timed(options, [options.peak_of])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    names = options.methods.split(",")
    names += ["published", "published:read"] if options.published else []
    names += ["published-blob", "published-blob:read"] if options.blob else []
    others = [name for name in ("peft", "peft:read") if name in names]
    memory = {name: peak(name) for name in names}
    print(table("method", timed(options, names), others, memory))


if __name__ == "__main__":
    main()
