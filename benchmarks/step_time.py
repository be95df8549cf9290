"""Time of a training step of each method, interleaved step by step in one process.

    python benchmarks/step_time.py                               # SmolLM2-135M's shape, fp32
    python benchmarks/step_time.py --size tiny --methods peft,bayesian-lora,blob
    python benchmarks/step_time.py --precision bfloat16 --json out/step_time.json
    python benchmarks/step_time.py --published CHECKOUT --blob CHECKOUT     # other projects' layers
    python benchmarks/step_time.py --top 10 --methods peft,bayesian-lora

Every method adapts q and v of all layers (or of the top ones) at rank 8 of a random network of one
shape, with the same batches, optimizer (AdamW) and gradient clipping. `peft` and other projects'
layers run the network as their scripts do, `net(**batch).logits[:, -1, answers]`; `peft:read`,
`published:read` and so on run the same layers as this library does, computing only what a
likelihood reads. A ratio is that of two steps that follow one another; the table has its median and
quartiles. Peak memory is that of a process of its own for each method.
"""

import argparse
import copy
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from plain_lora import PlainLoRA
from timing import (
    ANSWERS,
    RANK,
    TARGETS,
    Step,
    adapted,
    batches,
    bayesian_step,
    network,
    optimize,
    parser_of,
    rows_of,
    table,
    take_turns,
    write,
)
from torch import Tensor, nn

from pyro_blora.likelihoods import LabelTokens


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
        """From a normal of standard deviation 0.2."""
        variance = (2 * self.rho).exp()
        terms = (variance + self.mean.square()) / 0.08 - self.rho - 0.5
        return terms.sum()


def other_layers(
    method: str, net: nn.Module, checkouts: dict[str, Path]
) -> tuple[Callable[[], None], Callable[[], Tensor | float]]:
    """Puts the layers of ``method`` into the network; what to do before a step, and their KL."""
    if method == "peft":
        PlainLoRA(net, TARGETS, LabelTokens(token_ids=ANSWERS), rank=RANK)
        return lambda: None, lambda: 0.0
    if method == "hand-written":
        net.requires_grad_(False)
        names = [n for n, _ in net.named_modules() if n.rsplit(".", 1)[-1] in TARGETS]
        layers = [HandWritten(net.get_submodule(name)) for name in names]  # type: ignore[arg-type]
        for name, layer in zip(names, layers, strict=True):
            net.set_submodule(name, layer)
        return lambda: None, lambda: torch.stack([layer.kl() for layer in layers]).sum()
    import published

    layers_of = {"published": published.bayesian_lora, "published-blob": published.blob}
    return layers_of[method](net, TARGETS, RANK, checkouts[method])


def make(
    method: str,
    net: nn.Module,
    precision: str,
    particles: int,
    checkouts: dict[str, Path] | None = None,
    top: int | None = None,
) -> Step:
    """The training step of one method; ``checkouts`` has the folders of other projects."""
    likelihood = LabelTokens(token_ids=ANSWERS, num_data=1000)
    autocast = precision == "bfloat16"
    net.train()
    layers, _, how = method.partition(":")
    if layers not in {"peft", "hand-written", *(checkouts or {})}:
        blora = adapted(net, method, likelihood, top=top)
        step = bayesian_step(blora, particles)

        def in_precision(batch: dict[str, Tensor]) -> float:
            with blora.model.autocast(precision):
                return step(batch)

        return in_precision
    before, kl = other_layers(layers, net, checkouts or {})

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        before()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if how == "read":
                logits = likelihood.logits(net, batch)
            else:
                inputs = {key: batch[key] for key in likelihood.keys}
                logits = net(**inputs, use_cache=False).logits[:, -1, list(ANSWERS)]
        return nn.functional.cross_entropy(logits.float(), batch["labels"]) + kl() / 1000

    trained = [p for p in net.parameters() if p.requires_grad]
    return optimize(loss_of, [{"params": trained, "lr": 1e-3}])


def peak(method: str) -> float:
    """Peak memory in GiB of three steps of a method, in a process with the same options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def timed(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each step of each method, in turn."""
    base = network(arguments.size, arguments.layers)
    epoch = batches(arguments.warmup, arguments.rows, arguments.length)
    steps = {}
    folders = {"published": arguments.published, "published-blob": arguments.blob}
    checkouts = {name: folder for name, folder in folders.items() if folder is not None}
    # tensors of adapters belong to their modules, or the methods' names would meet in Pyro's store
    pyro.settings.set(module_local_params=True)
    for name in names:
        net = base if len(names) == 1 else copy.deepcopy(base)
        if arguments.checkpoint:
            net.activation_checkpointing_enable({"use_reentrant": False})
        if arguments.compile:
            net.model.compile(dynamic=False)
        steps[name] = make(
            name, net, arguments.precision, arguments.rows, checkouts=checkouts, top=arguments.top
        )
    runs = {n: lambda i, step=s: step(epoch[i % len(epoch)]) for n, s in steps.items()}
    with pyro.validation_enabled(False):
        return take_turns(runs, arguments.steps, arguments.warmup)


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, help="number of layers, in place of the shape's own")
    parser.add_argument(
        "--methods",
        default="peft,peft:read,bayesian-lora,mean-field,blob,hand-written:read",
        help="peft and hand-written, and with :read; any method or PRIOR+GUIDE, and "
        "bayesian-lora:scaled for the prior's conditional noise",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network's body")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing")
    parser.add_argument("--published", type=Path, help="checkout of arXiv:2601.21003's code")
    parser.add_argument("--blob", type=Path, help="checkout of BLoB's code, arXiv:2406.11675")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        arguments.steps, arguments.warmup = 2, 1
        timed(arguments, [arguments.peak_of])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    names = arguments.methods.split(",")
    names += ["published", "published:read"] if arguments.published else []
    names += ["published-blob", "published-blob:read"] if arguments.blob else []
    if names[0] != "peft":
        raise SystemExit("the first method must be peft, to which the others are compared")
    memory = {} if arguments.no_memory else {name: peak(name) for name in names}
    seconds = timed(arguments, names)
    others = [name for name in ("peft", "peft:read") if name in names]
    rows = rows_of(seconds, others)
    for row in rows if memory else []:
        row |= {"peak GiB": memory[row["name"]]}
        row |= {f"GiB to {other}": memory[row["name"]] / memory[other] for other in others}
    print(table("method", rows, others))
    write(arguments.json, vars(arguments), rows)


if __name__ == "__main__":
    main()
