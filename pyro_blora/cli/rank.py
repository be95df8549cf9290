"""``pyro-blora rank``: which items of a pool are worth a label."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import Task, load_task, read_json_lines, template_for

_NUMBERS = ("confidence", "entropy", "mutual_information")
By = Literal["mutual_information", "entropy", "random"]


def run(
    adapter: o.AdapterFolder,
    out: Annotated[Path, typer.Option(help="File for the ranking: .csv, or JSON lines.")],
    model: o.Base = None,
    task: o.OwnTask = None,
    data_dir: o.DataDir = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines of {"question": "...", "choices": ["...", "..."]}; labels and ids are '
            "optional. Default: the training items of TASK. TASK sets the prompt in either case."
        ),
    ] = None,
    by: Annotated[
        By, typer.Option(help="'mutual_information' is BALD: how much the draws disagree.")
    ] = "mutual_information",
    top: Annotated[
        int | None, typer.Option(help="How many items to write; default: all.", min=1)
    ] = None,
    num_samples: o.NumSamples = 10,
    seed: o.Seed = 0,
    precision: o.Precision = "auto",
) -> None:
    """Rank a pool of items, the one most worth a label first: active learning.

    Each item has a line: rank, id, question, choices (in .jsonl), the predicted answer and its
    confidence, and entropy and mutual information in nats.

    Example: pyro-blora rank --adapter out/arc_easy --task arc_easy --pool pool.jsonl --top 20
    --out out/to_label.jsonl
    """
    from pyro_blora.checkpoints import read_config, write_atomically
    from pyro_blora.evaluation.metrics import rank

    console = Console(highlight=False)
    saved = read_config(adapter)
    task = o.named(task, saved.get("notes", {}).get("task"), "--task")
    if pool is None:
        data = load_task(task, data_dir=data_dir)
        items = data.train
    else:
        items = tuple(read_json_lines(pool, labeled=False))
        data = Task(task, (), (), items, template_for(task))
    out.parent.mkdir(parents=True, exist_ok=True)
    base = o.named(model, saved.get("base_model"), "--model")
    predict = o.predictor(
        adapter, base, data, num_samples=num_samples, seed=seed, precision=precision
    )
    with o.phase("predict"):
        prediction, _ = predict(items)
    order = rank(prediction, by, seed=seed)[:top].tolist()
    answers = prediction.predictions.tolist()
    numbers = {name: getattr(prediction, name).tolist() for name in _NUMBERS}
    lines: list[dict[str, Any]] = []
    for i in order:
        item, own = items[i], {name: values[i] for name, values in numbers.items()}
        line = {"id": item.id, "question": item.question, "choices": item.choices}
        line["prediction"] = item.choices[answers[i]]
        lines.append({"rank": len(lines) + 1, **line, **own})
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
