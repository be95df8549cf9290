"""Time of a prediction with S draws against one plain forward pass of the same batch.

    python benchmarks/predict_time.py                     # adapters in every layer
    python benchmarks/predict_time.py --top 10            # in the top 10 layers alone

The rows are interleaved, one after the other in every round; a ratio is to the plain pass of its
own round. ``linearised`` is the one-pass predictive with 64 draws: one pass forward, and one back
for each class but the first.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step_time import RANK, SIZES, TARGETS, batches, network

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.recipes import recipe
from pyro_blora.results import versions


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="smollm2", help="shape of the network")
    parser.add_argument("--method", default="bayesian-lora", help="recipe or PRIOR+GUIDE")
    parser.add_argument("--top", type=int, help="adapt the top layers alone, this many")
    parser.add_argument("--samples", default="1,4,10,32", help="numbers of draws")
    parser.add_argument("--classes", type=int, default=2, help="answer tokens to choose from")
    parser.add_argument("--rows", type=int, default=8, help="examples in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens in an example")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pyro.settings.set(module_local_params=True)
    net = network(arguments.size, None).eval()
    layers = SIZES[arguments.size]["num_hidden_layers"]
    top = None if arguments.top is None else list(range(layers - arguments.top, layers))
    made = recipe(arguments.method)
    likelihood = LabelTokens(token_ids=range(5, 5 + arguments.classes), num_data=1000)
    blora = BayesianLoRA(
        net,
        target_modules=TARGETS,
        prior=made.prior(RANK),
        guide=made.guide(),
        likelihood=likelihood,
        layers_to_transform=top,
    )
    blora.model.precision = arguments.precision
    (batch,) = batches(1, arguments.rows, arguments.length)
    autocast = arguments.precision == "bfloat16"

    def plain() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            likelihood.logits(net, batch)

    runs: dict[str, Callable[[], Any]] = {"plain forward": plain}
    for count in map(int, arguments.samples.split(",")):
        runs[f"S = {count}"] = lambda count=count: blora.predict(batch, count)
    runs["linearised"] = lambda: blora.predict(batch, 64, linearised=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(arguments.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    document: dict[str, Any] = {"versions": versions(), "arguments": vars(arguments), "rows": []}
    print("| prediction | s | ratio to a plain forward (least - most) |\n|---|---|---|")
    for name in runs:
        pairs = zip(seconds[name], seconds["plain forward"], strict=True)
        ratios = [a / b for a, b in pairs]
        row = {"name": name, "seconds": statistics.median(seconds[name])}
        row |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        document["rows"].append(row)
        spread = f"{row['low']:.2f} - {row['high']:.2f}"
        print(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} ({spread}) |")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, default=str) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
