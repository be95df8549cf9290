"""Time of a training step of each method, interleaved step by step in one process.

    python benchmarks/step_time.py                               # SmolLM2-135M's shape, fp32
    python benchmarks/step_time.py --size tiny --methods peft,bayesian-lora,blob
    python benchmarks/step_time.py --precision bfloat16 --json out/step_time.json
    python benchmarks/step_time.py --published CHECKOUT --blob CHECKOUT     # other projects' layers

Every method adapts q and v of all layers at rank 8 of a random network of one shape, with the
same batches, likelihood, optimizer (AdamW) and gradient clipping. A ratio is that of two steps that
follow one another, `peft` being one; the table has its median and quartiles. Peak memory is that of
a process of its own for each method.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora.baselines import PlainLoRA
from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.inference import AnalyticELBO, parameter_groups
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.recipes import recipe
from pyro_blora.results import versions

SIZES: dict[str, dict[str, int]] = {
    "least": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 30, "heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "heads": 4},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9},
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "heads": 32,
    },
}
KEY_VALUE_HEADS = {"least": 4, "tiny": 4, "smollm2": 3, "llama-1b": 8}
RANK, TARGETS, ANSWERS = 8, ["q_proj", "v_proj"], (5, 6, 7)
RATES = {"mean": 1e-3, "scale": 1e-3, "direction": 1e-3}

Step = Callable[[dict[str, Tensor]], None]


def network(size: str, layers: int | None) -> nn.Module:
    """A random Llama of the given shape."""
    torch.manual_seed(0)
    options = dict(SIZES[size])
    heads = options.pop("heads")
    if layers is not None:
        options["num_hidden_layers"] = layers
    config = LlamaConfig(
        vocab_size=4096,
        num_attention_heads=heads,
        num_key_value_heads=KEY_VALUE_HEADS[size],
        **options,
    )
    return LlamaForCausalLM(config)


def batches(count: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Random token rows with a class each."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, length)
    return [
        {
            "input_ids": torch.randint(8, 4096, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "labels": torch.randint(len(ANSWERS), (rows,), generator=generator),
        }
        for _ in range(count)
    ]


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


def optimise(loss_of: Callable[[dict[str, Tensor]], Tensor], groups: list[dict[str, Any]]) -> Step:
    """A step of AdamW on a loss, its gradient clipped."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]

    def step(batch: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def make(
    method: str,
    net: nn.Module,
    precision: str,
    particles: int,
    rank: int = RANK,
    checkouts: dict[str, Path] | None = None,
) -> Step:
    """The training step of one method; ``checkouts`` has the folders of other projects."""
    likelihood = LabelTokens(token_ids=ANSWERS, num_data=1000)
    autocast = precision == "bfloat16"

    def nll(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = likelihood.logits(net, batch)
        return nn.functional.cross_entropy(logits, batch["labels"])

    net.train()
    if method == "peft":
        lora = PlainLoRA(net, TARGETS, likelihood, rank=rank)
        return optimise(nll, [{"params": list(lora.parameters.values()), "lr": 1e-3}])
    if method in (checkouts or {}):
        import published

        layers_of = {"published": published.bayesian_lora, "published-blob": published.blob}
        reset, kl = layers_of[method](net, TARGETS, rank, checkouts[method])
        own = [p for p in net.parameters() if p.requires_grad]

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            reset()
            return nll(batch) + kl() / 1000

        return optimise(loss_of, [{"params": own, "lr": 1e-3}])
    if method == "hand-written":
        net.requires_grad_(False)
        names = [n for n, _ in net.named_modules() if n.rsplit(".", 1)[-1] in TARGETS]
        layers = [HandWritten(net.get_submodule(name)) for name in names]  # type: ignore[arg-type]
        for name, layer in zip(names, layers, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, layer)
        own = [p for p in net.parameters() if p.requires_grad]
        return optimise(
            lambda batch: nll(batch) + sum(layer.kl() for layer in layers) / 1000,
            [{"params": own, "lr": 1e-3}],
        )
    name, _, conditional = method.partition(":")
    made = recipe(name)
    prior = made.prior(rank)
    if conditional:
        prior = type(prior)(**{**prior.options(), "conditional": conditional})
    pyro.clear_param_store()
    blora = BayesianLoRA(
        net,
        target_modules=TARGETS,
        prior=prior,
        guide=made.guide(),
        likelihood=likelihood,
    )
    blora.model.precision = precision
    nesting = blora.max_plate_nesting
    elbo = AnalyticELBO(
        num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting
    )(blora.model, blora.guide)
    both = nn.ModuleList([blora.model, blora.guide])
    return optimise(lambda batch: elbo(batch) / 1000, parameter_groups(both, RATES))


def peak(arguments: argparse.Namespace, method: str) -> float:
    """Peak memory in GiB of three steps of a method, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", method, "--size", arguments.size]
    command += ["--precision", arguments.precision, "--rows", str(arguments.rows)]
    command += ["--length", str(arguments.length)]
    if arguments.layers is not None:
        command += ["--layers", str(arguments.layers)]
    command += ["--compile"] if arguments.compile else []
    command += ["--checkpoint"] if arguments.checkpoint else []
    for option, folder in (("--published", arguments.published), ("--blob", arguments.blob)):
        command += [] if folder is None else [option, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def timed(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each step of each method, in turn."""
    base = network(arguments.size, arguments.layers)
    data = batches(arguments.steps + arguments.warmup, arguments.rows, arguments.length)
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
        steps[name] = make(name, net, arguments.precision, arguments.rows, checkouts=checkouts)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with pyro.validation_enabled(False):
        for index, batch in enumerate(data):
            for name in names:
                start = time.perf_counter()
                steps[name](batch)
                if index >= arguments.warmup:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="smollm2", help="shape of the network")
    parser.add_argument("--layers", type=int, help="number of layers, in place of the shape's own")
    parser.add_argument(
        "--methods",
        default="peft,bayesian-lora,mean-field,blob,hand-written",
        help="peft, hand-written, any recipe or PRIOR+GUIDE, and bayesian-lora:scaled for the "
        "prior's conditional noise",
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=8, help="examples in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens in an example")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network's body")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing")
    parser.add_argument("--published", type=Path, help="checkout of arXiv:2601.21003's code")
    parser.add_argument("--blob", type=Path, help="checkout of BLoB's code, arXiv:2406.11675")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        arguments.steps, arguments.warmup = 3, 0
        timed(arguments, [arguments.peak_of])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    names = arguments.methods.split(",")
    names += ["published"] if arguments.published else []
    names += ["published-blob"] if arguments.blob else []
    if names[0] != "peft":
        raise SystemExit("the first method must be peft, to which the others are compared")
    memory = {} if arguments.no_memory else {name: peak(arguments, name) for name in names}
    seconds = timed(arguments, names)
    document: dict[str, Any] = {"versions": versions(), "arguments": vars(arguments), "rows": []}
    print("| method | s a step | ratio to peft (quartiles) | peak memory GiB | ratio |")
    print("|---" * 5 + "|")
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds["peft"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"method": name, "seconds": statistics.median(seconds[name]), "ratio": middle}
        row |= {"low": low, "high": high, "peak_gib": memory.get(name)}
        document["rows"].append(row)
        gib = f"{memory[name]:.2f} | {memory[name] / memory['peft']:.3f}" if memory else " | "
        print(f"| {name} | {row['seconds']:.3f} | {middle:.3f} ({low:.3f} - {high:.3f}) | {gib} |")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, default=str) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
