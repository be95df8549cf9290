"""Times of training steps and predictions, in turn in one process, as ratios.

    python benchmarks/cost.py step --steps 12               # SmolLM2-135M's shape, float32
    python benchmarks/cost.py step --published CHECKOUT --blob CHECKOUT  # other projects' layers
    python benchmarks/cost.py predict --samples 1,4,10      # adapters in every layer
    python benchmarks/cost.py predict --top 10              # in the top 10 layers alone
    python benchmarks/cost.py picture                       # of docs/cost.md, by ratios.csv

The network is a random Llama, and every method adapts q and v of all blocks (or of the top ones) at
rank 8. A ratio is that of two runs of the same round; a table has its median and quartiles. In
`step` all methods have the same batches, AdamW and gradient clipping. `peft` and the layers of
other projects run the network as their scripts do, `net(**batch).logits[:, -1, answers]`;
`peft:read`, `published:read` and so on compute only the logits that a likelihood reads, as this
library does. Peak memory is that of a process for each method. In `predict`, `plain` is the
network's forward pass, and `linearized` has 64 draws and two classes.
"""

import copy
import csv
import resource
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pyro
import torch
from cells import BLUE, RED, markdown
from matplotlib.figure import Figure
from other_layers import LAYERS
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints.files import write_file
from pyro_blora.inference import parameter_groups
from pyro_blora.likelihoods import LabelTokens, Likelihood
from pyro_blora.methods import get_method

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads", "vocab_size")
SIZES = {
    "tiny": (64, 128, 4, 4, 4, 512),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "llama-1b": (2048, 8192, 4, 32, 8, 128256),  # four layers of it
}
ROWS, RANK, TARGETS, ANSWERS = 8, 8, ["q_proj", "v_proj"], (5, 6, 7)
METHODS = "peft,peft:read,bayesian-lora,mean-field,blob"
Batch = dict[str, Tensor]


def network(size: str) -> nn.Module:
    torch.manual_seed(0)
    shape = dict(zip(NAMES, SIZES[size], strict=True))
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))


def random_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(8, 512, (ROWS, 64), generator=generator),
        "attention_mask": torch.ones(ROWS, 64, dtype=torch.long),
        "labels": torch.randint(len(ANSWERS), (ROWS,), generator=generator),
    }


def adapted(net: nn.Module, method: str, likelihood: Likelihood, top: int) -> BayesianLoRA:
    """An adapter by the name of a method; ``:scaled`` adds conditional noise to its prior."""
    # Tensors belong to their modules, so that the adapters do not share names in Pyro's store
    pyro.settings.set(module_local_params=True)
    name, _, conditional = method.partition(":")
    record = get_method(name).with_rank(RANK)
    prior = record.prior
    if conditional:
        prior = type(prior)(**{**prior.options(), "conditional": conditional})
    layers = list(range(net.config.num_hidden_layers))[-top:]
    how = {"prior": prior, "guide": record.guide, "likelihood": likelihood}
    return BayesianLoRA(net, target_modules=TARGETS, layers_to_transform=layers, **how)


def take_turns(runs: Mapping[str, Any], rounds: int, warmup: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(what: str, seconds: Any, others: list[str], memory: Any = ()) -> str:
    """Median times and peak memory, with their ratios to ``others``; of times with quartiles."""
    head = [what, "s", *(f"ratio to {other} (quartiles)" for other in others)]
    head += ["peak GiB", *(f"GiB to {other}" for other in others)] if memory else []
    rows = []
    for name, own in seconds.items():
        rows.append([name, f"{median(own):.4f}"])
        for other in others:
            ratios = map(truediv, own, seconds[other])
            low, middle, high = quantiles(ratios, n=4, method="inclusive")
            rows[-1].append(f"{middle:.3f} ({low:.3f} - {high:.3f})")
        if memory:
            units = (1, *(memory[other] for other in others))
            rows[-1] += [f"{memory[name] / unit:.3f}" for unit in units]
    return "\n".join(markdown(head, rows))


def step_of(method: str, net: nn.Module, options: Namespace) -> Callable[[Batch], None]:
    """The training step of a method, as in :func:`pyro_blora.fit` without its loop."""
    likelihood = LabelTokens(token_ids=ANSWERS, num_data=1000)
    layers, _, how = method.partition(":")
    bfloat16, precision = options.precision == "bfloat16", nullcontext
    if layers in LAYERS:
        kl = LAYERS[layers](net, TARGETS, RANK, getattr(options, layers, None))
        groups = [{"params": [p for p in net.parameters() if p.requires_grad], "lr": 1e-3}]

        def loss_of(batch: Batch) -> Tensor:
            inputs = {key: batch[key] for key in likelihood.keys}
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                if how == "read":
                    logits = likelihood.logits(net, batch)
                else:
                    logits = net(**inputs, use_cache=False).logits[:, -1, list(ANSWERS)]
            return nn.functional.cross_entropy(logits.float(), batch["labels"]) + kl() / 1000

    else:
        blora = adapted(net, method, likelihood, options.top)
        rates = dict.fromkeys(("mean", "scale", "direction"), 1e-3)
        groups = parameter_groups(blora, random_batch(), rates)
        precision = partial(blora.model.autocast, options.precision)
        bound = TraceMeanField_ELBO(ROWS, blora.max_plate_nesting, vectorize_particles=True)
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
    base, batch, steps = network(options.size).train(), random_batch(), {}
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


def peak(options: Namespace, method: str) -> float:
    """Peak memory in GiB of three steps of a method, in a process of its own."""
    options.steps = 0  # the warm-up alone
    timed(options, [method])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(options: Namespace) -> None:
    names = options.methods.split(",")
    for name in ("published", "blob_layers"):
        names += [name, f"{name}:read"] if getattr(options, name) else []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.map(partial(peak, options), names, chunksize=1)
    others = [name for name in ("peft", "peft:read") if name in names]
    print(table("method", timed(options, names), others, dict(zip(names, found, strict=True))))


def predict(options: Namespace) -> None:
    net, batch = network(options.size).eval(), random_batch()
    likelihood = LabelTokens(token_ids=(5, 6), num_data=1000)
    blora = adapted(net, "bayesian-lora", likelihood, options.top)
    inputs = {key: batch[key] for key in likelihood.keys}
    runs = {"plain": partial(net, **inputs, use_cache=False)}
    runs["plain:read"] = partial(likelihood.logits, net, batch)
    for count in map(int, options.samples.split(",")):
        runs[f"S = {count}"] = partial(blora.predict, batch, count)
    runs["linearized"] = partial(blora.predict, batch, 64, linearized=True)
    with torch.no_grad():
        print(table("prediction", take_turns(runs, 5, warmup=1), ["plain", "plain:read"]))


def picture(options: Namespace) -> None:
    here, titles = Path(__file__).resolve().parent, {}
    titles["step"] = "A training step takes as long as PEFT's", "times PEFT's LoRA"
    titles["prediction"] = "A draw takes a forward pass", "times a forward pass"
    colors = {"usual": ("against the usual script", "#8c8c8c"), "like": ("like for like", BLUE)}
    with (here / "results/cost/ratios.csv").open(encoding="utf-8") as file:
        ratios = [row for row in csv.DictReader(file) if row["bar"]]
    figure = Figure(figsize=(3.8, 4.9), layout="constrained")
    over = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    for ax, (title, unit) in zip(figure.subplots(2), titles.values(), strict=True):
        bars = [row for row in ratios if titles[row["kind"]][0] == title]
        for shift, (kind, (label, color)) in zip((0.2, -0.2), colors.items(), strict=True):
            for k, row in enumerate(bars):
                ratio, low, high = (float(row[kind + end]) for end in ("", "_low", "_high"))
                place = len(bars) - k + shift
                ax.barh(place, ratio, 0.38, color=color, label=None if k else label)
                ax.hlines(place, low, high, color="black", linewidth=1.2)
                ax.annotate(f"{ratio:.2f}", (high, place), bbox=over, **where)
        ax.set_yticks(range(len(bars), 0, -1), [row["bar"] for row in bars])
        ax.axvline(1, color=RED, linewidth=1, zorder=2)
        ax.set_title(title, fontsize=9, loc="right")
        ax.set_xlabel(unit, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.margins(x=0.16)
    place = {"loc": "outside lower center", "ncols": 2, "columnspacing": 1, "handlelength": 1}
    figure.legend(*ax.get_legend_handles_labels(), fontsize=9, frameon=False, **place)
    write_file(here.parent / "docs/_static/cost.png", partial(figure.savefig, dpi=160))


def main() -> None:
    commands = {"step": step, "predict": predict, "picture": picture}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=commands)
    add("--size", choices=SIZES, default="smollm2", help="shape of the network")
    add("--top", type=int, default=0, help="number of blocks to adapt; default: all")
    add("--samples", default="1,4,10", help="numbers of draws")
    add("--methods", default=METHODS, help="also any other, PRIOR+GUIDE, or bayesian-lora:scaled")
    add("--steps", type=int, default=20, help="timed steps of each method")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--compile", action="store_true", help="torch.compile the network's body")
    add("--checkpoint", action="store_true", help="activation checkpointing")
    add("--published", type=Path, help="checkout of arXiv:2601.21003's code")
    add("--blob", type=Path, dest="blob_layers", help="checkout of BLoB's code, arXiv:2406.11675")
    options = parser.parse_args()
    commands[options.command](options)


if __name__ == "__main__":
    main()
