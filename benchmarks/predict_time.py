"""Time of a prediction with S draws relative to one forward pass of the plain network.

    python benchmarks/predict_time.py                     # adapters in every layer
    python benchmarks/predict_time.py --top 10            # in the top 10 layers alone

All rows follow one another in every round, and a ratio is to the pass of the same round. `plain` is
the forward pass of the network on the batch; `plain:read` computes only the logits that the
likelihood reads, as every prediction does. `linearized` is the linearized predictive with 64 draws
and two classes: one forward pass, and a backward pass for each class but the first.
"""

from functools import partial

import torch
from timing import adapted, batch_of, network, parser_of, table, take_turns

from pyro_blora.likelihoods import LabelTokens


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = parser_of(__doc__)
    parser.add_argument("--samples", default="1,4,10,32", help="numbers of draws")
    chosen = parser.parse_args()
    net = network(chosen.size).eval()
    likelihood = LabelTokens(token_ids=(5, 6), num_data=1000)
    blora = adapted(net, "bayesian-lora", likelihood, chosen.top)
    batch = batch_of()
    inputs = {key: batch[key] for key in likelihood.keys}
    runs = {
        "plain": partial(net, **inputs, use_cache=False),
        "plain:read": partial(likelihood.logits, net, batch),
    }
    for count in map(int, chosen.samples.split(",")):
        runs[f"S = {count}"] = partial(blora.predict, batch, count)
    runs["linearized"] = partial(blora.predict, batch, 64, linearized=True)
    with torch.no_grad(), blora.model.autocast(chosen.precision):
        print(table("prediction", take_turns(runs, 5), ["plain", "plain:read"]))


if __name__ == "__main__":
    main()
