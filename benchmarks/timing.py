"""What timings share: a random Llama, its batches, an adapter, its step; runs in turn; ratios."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.cli.comparison import versions
from pyro_blora.inference import parameter_groups
from pyro_blora.likelihoods import Likelihood
from pyro_blora.methods import get_method

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads", "vocab_size")
SIZES = {
    "tiny": (64, 128, 4, 4, 4, 512),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "llama-1b": (2048, 8192, 4, 32, 8, 128256),
}
RANK, TARGETS, ANSWERS = 8, ["q_proj", "v_proj"], (5, 6, 7)
RATES = {"mean": 1e-3, "scale": 1e-3, "direction": 1e-3}

Step = Callable[[dict[str, Tensor]], float]


def network(size: str, layers: int | None) -> nn.Module:
    """A random Llama of the given shape."""
    torch.manual_seed(0)
    options = dict(zip(NAMES, SIZES[size], strict=True))
    if layers is not None:
        options["num_hidden_layers"] = layers
    return LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=True))


def batches(count: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Random token rows with a class each."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, length)
    return [
        {
            "input_ids": torch.randint(8, 512, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "labels": torch.randint(len(ANSWERS), (rows,), generator=generator),
        }
        for _ in range(count)
    ]


def optimize(loss_of: Callable[[dict[str, Tensor]], Tensor], groups: list[dict[str, Any]]) -> Step:
    """A step of AdamW on a loss, its gradient clipped; returns the loss."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def adapted(
    net: nn.Module, method: str, likelihood: Likelihood, *, top: int | None = None
) -> BayesianLoRA:
    """This library's adapter by a method's name, ``:scaled`` for its prior's conditional noise."""
    name, _, conditional = method.partition(":")
    made = get_method(name)
    prior = made.prior_of(RANK)
    if conditional:
        prior = type(prior)(**{**prior.options(), "conditional": conditional})
    depth = int(net.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    return BayesianLoRA(
        net,
        target_modules=TARGETS,
        prior=prior,
        guide=made.guide_of(),
        likelihood=likelihood,
        layers_to_transform=None if top is None else list(range(depth - top, depth)),
    )


def bayesian_step(blora: BayesianLoRA, particles: int) -> Step:
    """The training step of :func:`pyro_blora.inference.fit`, without its loop."""
    elbo = TraceMeanField_ELBO(
        num_particles=particles,
        vectorize_particles=True,
        max_plate_nesting=blora.max_plate_nesting,
    )(blora.model, blora.guide)
    both = nn.ModuleList([blora.model, blora.guide])
    return optimize(lambda batch: elbo(batch) / 1000, parameter_groups(both, RATES))


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """The options of all timings."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="smollm2", help="shape of the network")
    parser.add_argument("--top", type=int, help="adapt the top blocks alone, this many")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=8, help="examples in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens in an example")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def take_turns(
    runs: Mapping[str, Callable[[int], Any]],
    rounds: int,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, all of them in every round, one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(index)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(own: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of times that followed one another."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(own, others, strict=True)], n=4, method="inclusive"
    )
    return {"ratio": middle, "low": low, "high": high}


def rows_of(seconds: Mapping[str, Sequence[float]], others: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each name: its median time, and its ratio to each of ``others``."""
    return [
        {"name": name, "seconds": statistics.median(own)}
        | {f"to {other}": ratio(own, seconds[other]) for other in others}
        for name, own in seconds.items()
    ]


def table(what: str, rows: Sequence[Mapping[str, Any]], others: Sequence[str]) -> str:
    """Rows of :func:`rows_of` in markdown; numbers that they have besides get columns, too."""
    more = [key for key in rows[0] if key not in ("name", "seconds") and key[:3] != "to "]
    head = [what, "s", *(f"ratio to {other} (quartiles)" for other in others), *more]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["name"], f"{row['seconds']:.4f}"]
        for other in others:
            found = row[f"to {other}"]
            cells.append(f"{found['ratio']:.3f} ({found['low']:.3f} - {found['high']:.3f})")
        lines.append([*cells, *(f"{row[key]:.3f}" for key in more)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: Path | None, arguments: Mapping[str, Any], rows: Any) -> None:
    """Puts rows, arguments and versions into a JSON file, where one is asked for."""
    if path is None:
        return
    document = {"versions": versions(), "arguments": dict(arguments), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
