"""Time of an epoch with the frozen blocks' outputs kept, against one without.

    python benchmarks/cached_prefix.py               # adapters in the top 8 of 30 blocks
    python benchmarks/cached_prefix.py --validation 1              # and a validation each epoch
    python benchmarks/cached_prefix.py --top 10 --json out/cached_prefix.json

Two adapters of one start see the same batches under the same seeds, one with
``fit(cache_frozen_prefix=True)``'s cache, epoch by epoch in turn. The first epoch fills the cache
and is not counted; losses are compared in all.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pyro
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ratios import rows_of, table, take_turns, write
from setting import ANSWERS, SIZES, adapted, batches, bayesian_step, network

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.inference.freed_memory import freed_memory_kept
from pyro_blora.likelihoods import Batch, LabelTokens
from pyro_blora.network.cached_prefix import PrefixCache


def epoch_of(
    blora: BayesianLoRA, data: list[Batch], held: list[Batch], losses: list[float], *, cached: bool
) -> Callable[[int], None]:
    """An epoch as ``fit`` runs it: a step for each batch of ``data``, then ``held`` validated."""
    cache = PrefixCache(blora.net, blora.model.adapters) if cached else None
    frozen_kept = nullcontext if cache is None else cache.in_place
    step = bayesian_step(blora, len(data[0]["labels"]))

    def epoch(number: int) -> None:
        torch.manual_seed(number)
        for batch in data:
            with frozen_kept():
                losses.append(step(batch))
        with frozen_kept():
            losses.extend(-float(blora.log_predictive(batch, 0).mean()) for batch in held)

    return epoch


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
    parser.add_argument("--validation", type=int, default=0, help="batches validated each epoch")
    parser.add_argument("--epochs", type=int, default=6, help="epochs, the first not timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pyro.settings.set(module_local_params=True)
    base = network(arguments.size, None).train()
    every = arguments.batches + arguments.validation
    made = batches(every, arguments.rows, arguments.length)
    data, held = made[: arguments.batches], made[arguments.batches :]
    losses: dict[str, list[float]] = {"without": [], "with": []}
    runs = {}
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(freed_memory_kept())  # as fit does
        for name, own in losses.items():
            torch.manual_seed(0)
            likelihood = LabelTokens(token_ids=ANSWERS, num_data=1000)
            blora = adapted(copy.deepcopy(base), "bayesian-lora", likelihood, top=arguments.top)
            runs[name] = epoch_of(blora, data, held, own, cached=name == "with")
        seconds = take_turns(runs, arguments.epochs - 1)
    rows = rows_of(seconds, ["without"])
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True))
    print(table("cache", rows, ["without"]))
    print(f"Losses differ by at most {apart:.1e} of themselves.")
    write(arguments.json, vars(arguments), [*rows, {"losses apart": apart}])


if __name__ == "__main__":
    main()
