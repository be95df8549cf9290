"""The one-pass predictive beside draws through the network: a saved adapter on a whole test file.

    pyro-blora train --task arc_easy --data-dir DATA --out out/arc_easy
    python benchmarks/one_pass.py --adapter out/arc_easy --task arc_easy --data-dir DATA
    python benchmarks/one_pass.py --adapter out/facts --items 100 --num-samples 16   # a quick look

Both predict the same items, which come in random order, so that fewer of them are a random part. A
half of the draws is a predictive of its own: how two of those differ is what the number of draws
alone does. Items are resampled for what the choice of items does to the differences. Then comes how
far the probabilities of an item are from the draws' (total variation), beside what two sets of as
many draws would be from each other, by the halves; and the slope of the draws' mean logits on the
one pass's: below 1, draws shrink them.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ratios import write
from torch import Tensor
from tqdm.auto import tqdm

from pyro_blora import BayesianLoRA, load_pretrained, load_task
from pyro_blora.evaluation.comparison import item_length, likelihood_for
from pyro_blora.evaluation.metrics import evaluate
from pyro_blora.evaluation.predict_dataset import predict_dataset
from pyro_blora.posterior.prediction import Prediction

DRAWS, ONE_PASS = "draws", "one pass"
AT_ONCE, RESAMPLED = 48, 300


def predicted(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Prediction], Tensor, dict[str, float]]:
    """What each of the two predicts, the labels, and the seconds that each took."""
    task = load_task(arguments.task, data_dir=arguments.data_dir)
    net, tokenizer = load_pretrained(arguments.model)
    collate = task.collator(tokenizer)
    likelihood = likelihood_for(task, collate)
    blora = BayesianLoRA.from_pretrained(net, arguments.adapter, likelihood=likelihood)
    order = np.random.default_rng(arguments.seed).permutation(len(task.test))[: arguments.items]
    parts: dict[str, list[Prediction]] = {ONE_PASS: [], DRAWS: []}
    labels, seconds = [], dict.fromkeys(parts, 0.0)
    for start in tqdm(range(0, len(order), AT_ONCE), desc=f"{len(order)} items", unit="part"):
        items = [task.test[int(index)] for index in order[start : start + AT_ONCE]]
        for name, found in parts.items():
            torch.manual_seed(arguments.seed + start)
            since = time.perf_counter()
            prediction, classes = predict_dataset(
                partial(
                    blora.predict, num_samples=arguments.num_samples, linearised=name == ONE_PASS
                ),
                items,
                collate,
                length=item_length,
                precision=arguments.precision,
                progress=False,
            )
            seconds[name] += time.perf_counter() - since
            found.append(prediction)
        labels.append(classes)
    return {k: Prediction.cat(v) for k, v in parts.items()}, torch.cat(labels), seconds


def differences(one_pass: Tensor, draws: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Draws' NLL in nats and ECE in points less the one-pass predictive's: mean, deviation."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLED):
        index = torch.from_numpy(generator.integers(0, len(labels), len(labels)))
        a, b = (evaluate(probs[index], labels[index]) for probs in (draws, one_pass))
        found.append((a.nll - b.nll, 100 * (a.ece - b.ece)))
    values = np.array(found)
    return {
        name: (float(column.mean()), float(column.std()))
        for name, column in zip(("nll", "ece"), values.T, strict=True)
    }


def total_variation(probs: Tensor, others: Tensor) -> float:
    """Mean over items of half the sum of the absolute differences of their probabilities."""
    return float((probs - others).abs().sum(-1).mean() / 2)


def slope(one_pass: Prediction, draws: Prediction) -> float:
    """Of the draws' mean logits on the one pass's, an item's own mean taken off both."""
    present = draws.samples.amin(0) > 0
    means = []
    for prediction in (one_pass, draws):
        logits = prediction.samples.log().mean(0).where(present, 0)
        middle = logits.sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
        means.append((logits - middle).where(present, 0))
    return float((means[0] * means[1]).sum() / means[0].square().sum())


def main() -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, help="folder that `train` wrote")
    parser.add_argument("--model", default="smollm2", help="as `pyro-blora evaluate`")
    parser.add_argument("--task", default="facts", help="as `pyro-blora evaluate`")
    parser.add_argument("--data-dir", type=Path, help="as `pyro-blora evaluate`")
    parser.add_argument("--items", type=int, help="test items; default: all")
    parser.add_argument("--num-samples", type=int, default=64, help="posterior draws of each")
    parser.add_argument("--seed", type=int, default=0, help="of the items' order and the draws")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.num_samples < 2 or (arguments.items is not None and arguments.items < 1):
        raise SystemExit("--num-samples must be at least 2, for its halves, and --items at least 1")
    predictions, labels, seconds = predicted(arguments)
    half = arguments.num_samples // 2
    draws = predictions[DRAWS]
    halves = [Prediction(part) for part in draws.samples[: 2 * half].split(half)]
    shown = {**predictions, f"draws 1 to {half}": halves[0]}
    shown[f"draws {half + 1} to {2 * half}"] = halves[1]
    print("| predictive | ACC % | ECE % | NLL | Brier | confidence % | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name, prediction in shown.items():
        row = evaluate(prediction.probs, labels).as_dict()
        row["confidence"] = float(prediction.confidence.mean())
        cells = [f"{100 * row['acc']:.1f}", f"{100 * row['ece']:.2f}", f"{row['nll']:.4f}"]
        cells += [f"{row['brier']:.4f}", f"{100 * row['confidence']:.1f}"]
        cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
        print(f"| {' | '.join([name, *cells])} |")
        rows.append({"name": name, "seconds": seconds.get(name), **row})
    found = differences(predictions[ONE_PASS].probs, draws.probs, labels)
    print(
        f"{len(labels)} items; draws less one pass over items drawn again: "
        f"NLL {found['nll'][0]:+.4f} ± {found['nll'][1]:.4f}, "
        f"ECE {found['ece'][0]:+.2f} ± {found['ece'][1]:.2f} points"
    )
    apart = total_variation(predictions[ONE_PASS].probs, draws.probs)
    share = (half / arguments.num_samples) ** 0.5  # a half's noise is that much larger
    by_chance = share * total_variation(halves[0].probs, halves[1].probs)
    print(
        f"an item's probabilities are {100 * apart:.2f} % from the draws'; those of two sets of "
        f"{arguments.num_samples} draws would be {100 * by_chance:.2f} % apart"
    )
    shrunk = slope(predictions[ONE_PASS], draws)
    print(f"the draws' mean logits are {shrunk:.3f} of the one pass's")
    write(
        arguments.json,
        vars(arguments),
        {
            "rows": rows,
            "draws less one pass": found,
            "from draws": apart,
            "by chance": by_chance,
            "slope of mean logits": shrunk,
        },
    )


if __name__ == "__main__":
    main()
