"""The one-pass predictive beside draws through the network: a saved adapter on a whole test file.

    pyro-blora train --task arc_easy --data-dir DATA --out out/arc_easy
    python benchmarks/one_pass.py --adapter out/arc_easy --task arc_easy --data-dir DATA
    python benchmarks/one_pass.py --adapter out/facts --items 100 --num-samples 16   # a quick look

`--draws FILE` keeps what draws predict for another run: they take nine times as long as all else.
Both predict the same items, which come in random order, so that fewer of them are a random part. A
half of the draws is a predictive of its own: how two of those differ is what the number of draws
alone does. `from draws` is the total variation distance of an item's probabilities from the draws',
of a half from the other half's. Items are resampled for what the choice of items does to the
differences. The last line has the slope of the draws' mean logits on the one pass's: below 1, draws
shrink them.
"""

import argparse
import hashlib
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ratios import write
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pyro_blora import BayesianLoRA, load_pretrained, load_task
from pyro_blora.comparison import item_length, likelihood_for
from pyro_blora.inference import predict_dataset
from pyro_blora.metrics import evaluate
from pyro_blora.prediction import Prediction

DRAWS, ONE_PASS = "draws", "one pass"
AT_ONCE, RESAMPLED = 48, 300


def what_was_drawn(arguments: argparse.Namespace) -> dict[str, str]:
    """What decides the draws' predictions, to be kept beside them."""
    decisive = ("model", "task", "items", "num_samples", "seed", "precision")
    adapter = b"".join(
        path.read_bytes() for path in sorted(arguments.adapter.glob("bayesian_lora*"))
    )
    return {name: str(vars(arguments)[name]) for name in decisive} | {
        "adapter": hashlib.sha256(adapter).hexdigest()
    }


def kept_draws(arguments: argparse.Namespace) -> tuple[Prediction, float] | None:
    """The draws' predictions and seconds of an earlier run, if there is one."""
    if arguments.draws is None or not arguments.draws.exists():
        return None
    with safe_open(arguments.draws, framework="pt") as file:
        found, samples = file.metadata(), file.get_tensor("samples")
    seconds = float(found.pop("seconds"))
    asked = what_was_drawn(arguments)
    if differing := {k: found.get(k) for k, v in asked.items() if found.get(k) != v}:
        raise SystemExit(f"{arguments.draws} has other draws, of {differing}; name another file.")
    return Prediction(samples), seconds


def predicted(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Prediction], Tensor, dict[str, float]]:
    """What each of the two predicts, the labels, and the seconds that each took."""
    kept = kept_draws(arguments)
    task = load_task(arguments.task, data_dir=arguments.data_dir)
    net, tokenizer = load_pretrained(arguments.model)
    collate = task.collator(tokenizer)
    likelihood = likelihood_for(task, collate)
    blora = BayesianLoRA.from_pretrained(net, arguments.adapter, likelihood=likelihood)
    order = np.random.default_rng(arguments.seed).permutation(len(task.test))[: arguments.items]
    parts: dict[str, list[Prediction]] = {ONE_PASS: [], DRAWS: []}
    labels, seconds = [], dict.fromkeys(parts, 0.0)
    if kept is not None:
        parts[DRAWS], seconds[DRAWS] = [kept[0]], kept[1]
    for start in tqdm(range(0, len(order), AT_ONCE), desc="items", unit_scale=AT_ONCE):
        items = [task.test[int(index)] for index in order[start : start + AT_ONCE]]
        for name, found in parts.items():
            if name == DRAWS and kept is not None:
                continue
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
    predictions = {name: Prediction.cat(found) for name, found in parts.items()}
    if arguments.draws is not None and kept is None:
        about = what_was_drawn(arguments) | {"seconds": str(seconds[DRAWS])}
        save_file({"samples": predictions[DRAWS].samples.contiguous()}, arguments.draws, about)
    return predictions, torch.cat(labels), seconds


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
    parser.add_argument("--precision", default="bfloat16", help="float32 or bfloat16")
    parser.add_argument("--draws", type=Path, help="file that keeps the draws' predictions")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    predictions, labels, seconds = predicted(arguments)
    half = arguments.num_samples // 2
    draws = predictions[DRAWS]
    halves = [Prediction(part) for part in draws.samples[: 2 * half].split(half)]
    shown = {name: (prediction, draws) for name, prediction in predictions.items()}
    shown[f"draws 1 to {half}"] = halves[0], halves[1]
    shown[f"draws {half + 1} to {2 * half}"] = halves[1], halves[0]
    print("| predictive | ACC % | ECE % | NLL | Brier | confidence % | from draws % | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name, (prediction, beside) in shown.items():
        row = evaluate(prediction.probs, labels).as_dict()
        row["confidence"] = float(prediction.confidence.mean())
        row["from draws"] = total_variation(prediction.probs, beside.probs)
        cells = [f"{100 * row['acc']:.1f}", f"{100 * row['ece']:.2f}", f"{row['nll']:.4f}"]
        cells += [f"{row['brier']:.4f}", f"{100 * row['confidence']:.1f}"]
        cells.append(f"{100 * row['from draws']:.2f}")
        cells.append(f"{seconds[name]:.0f}" if name in seconds else "")
        print(f"| {' | '.join([name, *cells])} |")
        rows.append({"name": name, "seconds": seconds.get(name), **row})
    found = differences(predictions[ONE_PASS].probs, draws.probs, labels)
    print(
        f"{len(labels)} items; draws less one pass over items drawn again: "
        f"NLL {found['nll'][0]:+.4f} ± {found['nll'][1]:.4f}, "
        f"ECE {found['ece'][0]:+.2f} ± {found['ece'][1]:.2f} points"
    )
    shrunk = slope(predictions[ONE_PASS], draws)
    print(f"the draws' mean logits are {shrunk:.3f} of the one pass's")
    write(
        arguments.json,
        vars(arguments),
        {"rows": rows, "draws less one pass": found, "slope of mean logits": shrunk},
    )


if __name__ == "__main__":
    main()
