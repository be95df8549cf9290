"""Shared parts of the timings: a random Llama, its batches, an adapter, runs in turn, ratios.

As a program it draws the picture of docs/cost.md by results/cost/ratios.csv.
"""

import csv
import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.likelihoods import Likelihood
from pyro_blora.methods import get_method

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads", "vocab_size")
SIZES = {
    "tiny": (64, 128, 4, 4, 4, 512),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "llama-1b": (2048, 8192, 4, 32, 8, 128256),
}
ROWS, RANK, TARGETS, ANSWERS = 8, 8, ["q_proj", "v_proj"], (5, 6, 7)


def parser_of(about: str | None) -> ArgumentParser:
    """The options of all timings."""
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smollm2", help="shape of the network")
    parser.add_argument("--top", type=int, help="number of blocks to adapt; default: all")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    # Tensors belong to their modules, so that the adapters do not share names in Pyro's store
    pyro.settings.set(module_local_params=True)
    return parser


def network(size: str, layers: int | None = None) -> nn.Module:
    """A random Llama of a shape, or with another number of layers."""
    torch.manual_seed(0)
    options = dict(zip(NAMES, SIZES[size], strict=True))
    options["num_hidden_layers"] = layers or options["num_hidden_layers"]
    return LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=True))


def batch_of() -> dict[str, Tensor]:
    """Random rows of tokens, each with a class."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(8, 512, (ROWS, 64), generator=generator),
        "attention_mask": torch.ones(ROWS, 64, dtype=torch.long),
        "labels": torch.randint(len(ANSWERS), (ROWS,), generator=generator),
    }


def adapted(
    net: nn.Module, method: str, likelihood: Likelihood, top: int | None = None
) -> BayesianLoRA:
    """An adapter by the name of a method; ``:scaled`` adds conditional noise to its prior."""
    name, _, conditional = method.partition(":")
    made = get_method(name)
    prior = made.with_rank(RANK).prior
    if conditional:
        prior = type(prior)(**{**prior.options(), "conditional": conditional})
    depth = int(net.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    return BayesianLoRA(
        net,
        target_modules=TARGETS,
        prior=prior,
        guide=made.guide,
        likelihood=likelihood,
        layers_to_transform=list(range(depth - (top or depth), depth)),
    )


def take_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run in each round; in a round all runs follow one another."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    others: Sequence[str],
    memory: Mapping[str, float] | None = None,
) -> str:
    """Median times and peak memory in markdown, with their ratios to ``others``.

    Ratios of times are medians and quartiles over rounds.
    """
    head = [what, "s", *(f"ratio to {other} (quartiles)" for other in others)]
    if memory:
        head += ["peak GiB", *(f"GiB to {other}" for other in others)]
    rows = [head, ["---"] * len(head)]
    for name, own in seconds.items():
        cells = [name, f"{statistics.median(own):.4f}"]
        for other in others:
            ratios = [a / b for a, b in zip(own, seconds[other], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells.append(f"{middle:.3f} ({low:.3f} - {high:.3f})")
        if memory:
            cells += [f"{memory[name] / of:.3f}" for of in (1, *(memory[n] for n in others))]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


BARS = {  # rows of ratios.csv by their labels, below what they show and what they are divided by
    ("A training step takes as long as PEFT's", "times PEFT's LoRA"): {
        "this library": "default",
        "top 10 of 30 blocks": "default in the top 10 of 30 blocks",
        "Bayesian-LoRA's code": "Bayesian-LoRA's published layers",
        "BLoB's code": "BLoB's published layers",
    },
    ("A draw takes a forward pass", "times a forward pass"): {
        "1 draw": "1 draw",
        "10 draws": "10 draws",
        "10 draws, top 10 blocks": "10 draws of the top 10 of 30 blocks",
        "linearized, 2 classes": "linearized with two classes",
    },
}
COLORS = {"usual": ("against the usual script", "#8c8c8c"), "like": ("like for like", "#2f5f94")}


def draw(ratios: Mapping[str, Mapping[str, str]]) -> Figure:
    """Bars of ratios of times with their quartiles."""
    figure = Figure(figsize=(3.8, 4.9), layout="constrained")
    over = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for ax, ((title, unit), bars) in zip(figure.subplots(2), BARS.items(), strict=True):
        for shift, (kind, (label, color)) in zip((0.2, -0.2), COLORS.items(), strict=True):
            rows = [ratios[name] for name in bars.values()]
            middle, low, high = (
                [float(row[kind + end]) for row in rows] for end in ("", "_low", "_high")
            )
            places = [len(bars) - k + shift for k in range(len(bars))]
            ax.barh(places, middle, 0.38, color=color, label=label)
            ax.hlines(places, low, high, color="black", linewidth=1.2)
            for place, ratio, end in zip(places, middle, high, strict=True):
                where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                ax.annotate(f"{ratio:.2f}", (end, place), fontsize=9, bbox=over, **where)
        ax.set_yticks(range(len(bars), 0, -1), list(bars))
        ax.axvline(1, color="#d9484a", linewidth=1, zorder=2)
        ax.set_title(title, fontsize=9, loc="right")
        ax.set_xlabel(unit, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        ax.margins(x=0.16)
    place = {"loc": "outside lower center", "ncols": 2, "columnspacing": 1, "handlelength": 1}
    figure.legend(*ax.get_legend_handles_labels(), fontsize=9, frameon=False, **place)
    return figure


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    with (here / "results/cost/ratios.csv").open(encoding="utf-8") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    draw(rows).savefig(here.parent / "docs/_static/cost.png", dpi=160)
