"""Time of a prediction with S draws against one forward pass of the plain network.

    python benchmarks/predict_time.py                     # adapters in every layer
    python benchmarks/predict_time.py --top 10            # in the top 10 layers alone

The rows are interleaved, one after the other in every round; a ratio is to a pass of its own round.
`plain` is the network's own forward of the same batch, `plain:read` one that computes only what the
likelihood reads, as all predictions do. `linearized` is the one-pass predictive with 64 draws: one
pass forward, and one back for each class but the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from timing import adapted, batches, network, parser_of, rows_of, table, take_turns, write

from pyro_blora.likelihoods import LabelTokens


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = parser_of(__doc__)
    parser.add_argument("--method", default="bayesian-lora", help="method or PRIOR+GUIDE")
    parser.add_argument("--samples", default="1,4,10,32", help="numbers of draws")
    parser.add_argument("--classes", type=int, default=2, help="answer tokens to choose from")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pyro.settings.set(module_local_params=True)
    net = network(arguments.size, None).eval()
    likelihood = LabelTokens(token_ids=range(5, 5 + arguments.classes), num_data=1000)
    blora = adapted(net, arguments.method, likelihood, top=arguments.top)
    (batch,) = batches(1, arguments.rows, arguments.length)
    autocast = arguments.precision == "bfloat16"

    @torch.no_grad()
    def plain(read: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if read:
                likelihood.logits(net, batch)
            else:
                net(**{key: batch[key] for key in likelihood.keys}, use_cache=False)

    runs: dict[str, Callable[[], Any]] = {"plain": partial(plain, False)}
    runs["plain:read"] = partial(plain, True)
    for count in map(int, arguments.samples.split(",")):
        runs[f"S = {count}"] = partial(blora.predict, batch, count)
    runs["linearized"] = partial(blora.predict, batch, 64, linearized=True)
    with blora.model.autocast(arguments.precision):
        timed = {name: lambda _, run=run: run() for name, run in runs.items()}
        seconds = take_turns(timed, arguments.rounds)
    rows = rows_of(seconds, ["plain", "plain:read"])
    print(table("prediction", rows, ["plain", "plain:read"]))
    write(arguments.json, vars(arguments), rows)


if __name__ == "__main__":
    main()
