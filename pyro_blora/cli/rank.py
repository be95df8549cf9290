"""``pyro-blora rank``: which items of a pool are worth a label."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.cli._saved_adapter import AdapterFolder, OwnTask, Seed, own_task, predictor
from pyro_blora.errors import ConfigurationError, near_miss

__all__ = ["run"]

_FORMATS = (".jsonl", ".csv")


def run(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Option(help="File for the ranking: .jsonl, or .csv.")],
    model: o.Base = None,
    task: OwnTask = None,
    data_dir: o.DataDir = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines of {"question": "...", "choices": ["...", "..."]}, labels and ids as '
            "there are; default: the training items of TASK. TASK names the prompt in either case."
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="'mutual_information' (BALD: where the posterior's draws disagree), 'entropy' or "
            "'random'."
        ),
    ] = "mutual_information",
    top: Annotated[
        int | None, typer.Option(help="How many items to write; default: all.", min=1)
    ] = None,
    num_samples: o.NumSamples = 10,
    seed: Seed = 0,
    precision: o.Precision = "auto",
) -> None:
    """Rank a pool of items, the one most worth a label first: active learning.

    A line for each item: rank, id, question, choices (in .jsonl), the answer predicted and its
    confidence, entropy and mutual information in nats.

    Example: pyro-blora rank --adapter out/arc_easy --task arc_easy --pool pool.jsonl --top 20
    --out out/to_label.jsonl
    """
    from pyro_blora.checkpoints import write_atomically
    from pyro_blora.data import Task, load_task, read_json_lines, template_for
    from pyro_blora.evaluation.ranking import CRITERIA, rank

    if by not in CRITERIA:
        raise ConfigurationError(f"--by {by!r} is no criterion; {near_miss(by, CRITERIA)}.")
    if by == "mutual_information" and num_samples < 2:
        raise ConfigurationError(
            f"--num-samples {num_samples} gives no mutual information; take 2 or more, or another "
            "--by."
        )
    if out.suffix not in _FORMATS or out.is_dir():
        raise ConfigurationError(f"--out {out} must be a file that ends in .jsonl or .csv.")
    if pool is not None and not pool.is_file():
        raise ConfigurationError(f"--pool {pool} is no file; name one of JSON lines.")
    console = Console(highlight=False)
    task = own_task(adapter, task)  # a folder that is none is said before the network is loaded
    if pool is None:
        data = load_task(task, data_dir=data_dir)
        items = data.train
    else:
        items = tuple(read_json_lines(pool, labelled=False))
        data = Task(task, (), (), items, template_for(task))
    if not items:
        raise ConfigurationError(f"task {task!r} has no training items; name a file by --pool.")
    o.check_out(out.parent)
    given: dict[str, Any] = {"num_samples": num_samples, "precision": o.chosen(precision, console)}
    predict = predictor(adapter, model, data, seed=seed, **given)
    with o.phase("predict"):
        prediction, _ = predict(items)
    order = rank(prediction, by, seed=seed)[:top].tolist()
    columns = {
        name: getattr(prediction, name).tolist()
        for name in ("predictions", "confidence", "entropy", "mutual_information")
    }
    lines = [
        {
            "rank": place,
            "id": items[i].id,
            "question": items[i].question,
            "choices": items[i].choices,
            "prediction": items[i].choices[columns["predictions"][i]],
            **{name: columns[name][i] for name in list(columns)[1:]},
        }
        for place, i in enumerate(order, start=1)
    ]
    write_atomically(out, lambda path: _write(path, lines, out.suffix))
    console.print(f"Written: {out}, {len(lines)} of {len(items)} items by {by.replace('_', ' ')}")


def _write(path: Path, lines: Sequence[dict[str, Any]], suffix: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".csv":
            names = [name for name in lines[0] if name != "choices"]
            table = csv.DictWriter(file, names, extrasaction="ignore")
            table.writeheader()
            table.writerows(lines)
        else:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
