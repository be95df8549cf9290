"""Time of an epoch with the frozen blocks' outputs kept, against one without.

    python benchmarks/cached_prefix.py               # adapters in the top 8 of 30 blocks
    python benchmarks/cached_prefix.py --top 10 --json out/cached_prefix.json

Two adapters of one start see the same batches under the same seeds, one with
``fit(cache_frozen_prefix=True)``'s cache, step by step in turn. The first epoch fills the cache and
is not counted; losses are compared in all.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyro
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step_time import ANSWERS, RANK, RATES, SIZES, TARGETS, batches, network
from torch import nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.cached_prefix import PrefixCache
from pyro_blora.inference import AnalyticELBO, parameter_groups
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.recipes import recipe
from pyro_blora.results import versions


def main() -> None:
    """Runs the benchmark and prints its ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="smollm2", help="shape of the network")
    parser.add_argument("--top", type=int, default=8, help="adapt the top blocks, this many")
    parser.add_argument("--rows", type=int, default=8, help="examples in a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens in an example")
    parser.add_argument("--batches", type=int, default=4, help="batches in an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="epochs, the first not timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pyro.settings.set(module_local_params=True)
    layers = SIZES[arguments.size]["num_hidden_layers"]
    base, made = network(arguments.size, None), recipe("bayesian-lora")
    data = batches(arguments.batches, arguments.rows, arguments.length)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        blora = BayesianLoRA(
            copy.deepcopy(base).train(),
            target_modules=TARGETS,
            prior=made.prior(RANK),
            guide=made.guide(),
            likelihood=LabelTokens(token_ids=ANSWERS, num_data=1000),
            layers_to_transform=list(range(layers - arguments.top, layers)),
        )
        elbo = AnalyticELBO(
            num_particles=arguments.rows, vectorize_particles=True, max_plate_nesting=1
        )(blora.model, blora.guide)
        both = nn.ModuleList([blora.model, blora.guide])
        optimizer = torch.optim.AdamW(parameter_groups(both, RATES), weight_decay=0.0)
        runs.append((blora, elbo, optimizer))
    seconds: list[list[float]] = [[], []]
    losses: list[list[float]] = [[], []]
    with ExitStack() as stack:
        cached = runs[1][0]
        stack.enter_context(PrefixCache(cached.net, cached.model.adapters).in_place())
        stack.enter_context(pyro.validation_enabled(False))
        for epoch in range(arguments.epochs):
            spent = [0.0, 0.0]
            for index, batch in enumerate(data):
                for which, (_, elbo, optimizer) in enumerate(runs):
                    torch.manual_seed(1000 * epoch + index)
                    start = time.perf_counter()
                    optimizer.zero_grad()
                    loss = elbo(batch) / 1000
                    loss.backward()
                    optimizer.step()
                    spent[which] += time.perf_counter() - start
                    losses[which].append(float(loss.detach()))
            if epoch:
                for which in range(2):
                    seconds[which].append(spent[which])
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    row: dict[str, Any] = {"ratio": statistics.median(ratios), "low": min(ratios)}
    row |= {"high": max(ratios), "losses_apart": apart}
    print(
        f"top {arguments.top} of {layers} blocks: an epoch with the cache takes {row['ratio']:.3f} "
        f"({row['low']:.3f} - {row['high']:.3f}) of one without; losses differ by at most "
        f"{apart:.1e} of themselves"
    )
    if arguments.json:
        document = {"versions": versions(), "arguments": vars(arguments), **row}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, default=str) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
