"""Methods side by side on one task: the same data, budget, scoring and metrics for each."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getclosurevars
from itertools import product
from os import PathLike
from pathlib import Path
from statistics import mean, stdev
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints.files import check_folder
from pyro_blora.data import Task, load_task
from pyro_blora.data.splits import hold_out
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.metrics import error_of, out_of_scope
from pyro_blora.evaluation.plots import reliability_diagram, save_figure
from pyro_blora.evaluation.results import Row, read, write
from pyro_blora.inference import FitResult, fit
from pyro_blora.likelihoods import Collate, Likelihood, MultipleChoice, usual_likelihood
from pyro_blora.methods import LINEARIZED, Method, get_method
from pyro_blora.network.pretrained import choose_precision, load_for
from pyro_blora.network.targets import CLASS, TEXT, is_classifier, kind_of_head, logit_names
from pyro_blora.posterior.bayesian_lora_model import one_at_a_time
from pyro_blora.prediction import Prediction
from pyro_blora.scores import SHOWN, SURE, sure_answers

DIAGRAM = "reliability.png"
_FILES = (".bin", ".gguf", ".jinja", ".json", ".model", ".safetensors", ".txt")  # of a network


@dataclass(frozen=True)
class View:
    """How an adapter predicts; ``None`` stands for the usual of its method."""

    num_samples: int | None = None
    linearized: bool | None = None
    distilled: bool = False
    holds_out: bool = False  # an eighth of the training items, for a temperature


#: The views of a method by the kind in ``KIND:NAME``.
VIEWS = {
    "split": View(holds_out=True),
    "mean": View(num_samples=0),
    "linearized": View(num_samples=LINEARIZED, linearized=True),
    "distilled": View(num_samples=0, distilled=True),
}


@dataclass(frozen=True)
class Entry:
    """What a row of a comparison shows: a method, and a view of its adapter."""

    name: str
    method: Method
    view: View


def entry(name: str, methods: Sequence[Method] = ()) -> Entry:
    """The entry of a row ``NAME`` or ``KIND:NAME``, of one of these methods or a known one."""
    kind, _, base = name.partition(":")
    if not base or kind not in VIEWS:
        kind, base = "", name
    method = next((method for method in methods if method.name == base), None)
    return Entry(name, method or get_method(base), VIEWS.get(kind, View()))


@dataclass
class Comparison:
    """The results of :func:`compare`: a row for each method and seed.

    It prints as a table of means and deviations over the seeds, and a notebook shows it as one.

    Attributes:
        rows: the metrics, and the test items' ``probs`` and ``labels``, of each method and seed.
        title: what was compared.
    """

    rows: list[Row]
    title: str = ""

    def by_method(self) -> dict[str, list[Row]]:
        """The rows of each method, in the order in which they were passed."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            rows.setdefault(row.method, []).append(row)
        return rows

    def differences(
        self, reference: str | None = None
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """The NLL, and of classes the Brier score, minus those of a reference, with their errors.

        Differences are paired by item and seed. A difference plus and minus twice its error, which
        is that of :func:`~pyro_blora.evaluation.metrics.error_of`, is a 95 % interval.

        Args:
            reference: a method. Default: the first one.

        Returns:
            By method and by ``"nll"`` or ``"brier"``, the mean difference and its error.
        """
        by = self.by_method()
        reference = next(iter(by)) if reference is None else reference
        base = {row.seed: row.item_scores for row in by.pop(reference)}
        differences = {}
        for method, rows in by.items():
            gaps = torch.stack([row.item_scores - base[row.seed] for row in rows])
            both = zip(gaps.mean((0, -1)).tolist(), error_of(gaps).tolist(), strict=True)
            differences[method] = dict(zip(("nll", "brier"), both, strict=False))
        return differences

    def columns(self) -> dict[str, list[str]]:
        """The table's columns by title, an entry for each method."""
        by = self.by_method()
        weak = {row.method for row in self.rows if not row.has_learned}
        columns = {"method": [f"{n} (has not learned)" if n in weak else n for n in by]}
        for key, (title, factor, form) in SHOWN.items():
            if key in self.rows[0].metrics:
                each = [[factor * row.metrics[key] for row in rows] for rows in by.values()]
                columns[title] = [_spread(values, form) for values in each]
        if "ece" in self.rows[0].metrics:
            counts = [[sure_answers(r.probs, r.labels) for r in rows] for rows in by.values()]
            sums = [map(sum, zip(*of_seeds, strict=True)) for of_seeds in counts]
            columns[f"wrong above {100 * SURE:.0f} %"] = [f"{wrong} of {n}" for n, wrong in sums]
        if len(by) > 1:
            gaps = [gap["nll"] for gap in self.differences().values()]
            texts = [f"{gap:+.3f} ± {error:.3f}" for gap, error in gaps]
            columns[f"NLL minus {next(iter(by))}'s"] = ["", *texts]
        given = [[row.auroc for row in rows if row.auroc is not None] for rows in by.values()]
        if any(given):
            each = [[100 * area for area in areas] for areas in given]
            columns["out of scope, AUROC %"] = [_spread(areas, ".1f") for areas in each]
        for key in ("temperature_by", "passes"):
            values = [dict.fromkeys(str(getattr(row, key)) for row in rows) for rows in by.values()]
            if any({*each} - {"none", "0"} for each in values):
                columns[key.replace("_", " ")] = list(map(", ".join, values))
        return columns

    def to_markdown(self) -> str:
        """The table in Markdown."""
        columns = self.columns()
        lines = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
        lines += map(list, zip(*columns.values(), strict=True))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __str__(self) -> str:
        return f"{self.title}\n\n{self.to_markdown()}"

    _repr_markdown_ = __str__

    def __rich__(self) -> Table:
        table = Table(title=self.title or None, box=None, padding=(0, 1, 0, 0), pad_edge=False)
        columns = self.columns()
        columns.pop("Brier", None)  # for which 80 columns have no room
        for name, cells in columns.items():
            first = name == "method"
            words = [len(word) for cell in (name, *cells) for word in cell.split()]
            width = max(words) if name[0].islower() and not first else None  # of 80 columns
            table.add_column(name, justify="left" if first else "right", no_wrap=first, width=width)
        for line in zip(*columns.values(), strict=True):
            table.add_row(*line)
        return table

    def plot(self) -> Any:
        """A reliability diagram for each method, which pools the predictions of all seeds."""
        if "ece" not in self.rows[0].metrics:
            raise ConfigurationError("A reliability diagram must be of classes, got numbers.")
        pooled = {}
        for name, rows in self.by_method().items():
            known = torch.cat([row.labels >= 0 for row in rows])  # -100 stands for a missing label
            probs, labels = (torch.cat([getattr(r, n) for r in rows]) for n in ("probs", "labels"))
            pooled[name] = probs[known], labels[known]
        return reliability_diagram(pooled)


def _spread(values: Sequence[float], form: str) -> str:
    """The mean and the deviation, in the form of the mean."""
    deviation = f" ± {stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}" if values else ""


@one_at_a_time
def compare(
    network: str | tuple[nn.Module, Any],
    data: Any,
    methods: Sequence[str] = ("lora", "split:lora", "bayesian-lora"),
    *,
    own: Sequence[Method] = (),
    seeds: Sequence[int] = (0, 1, 2),
    num_steps: int = 300,
    max_train: int | None = None,
    max_test: int | None = None,
    data_dir: str | PathLike[str] | None = None,
    rank: int | None = None,
    target_modules: str | Sequence[str] | None = None,
    num_samples: int = 10,
    precision: str = "auto",
    outside: Any = None,
    likelihood: Likelihood | None = None,
    out: str | PathLike[str] | None = None,
    callback: Callable[[Row], None] | None = None,
    **training: Any,
) -> Comparison:
    """Trains methods on the same examples, and scores each on the same test items.

    A seed sets the training items, a new head, the order of the batches and all draws, the same
    for every method. A method whose scores need a temperature fits it to an eighth of its training
    items, which it holds out; the column ``temperature by`` says which methods do.

    Args:
        network: a name for :func:`~pyro_blora.load_pretrained`, or a network and its tokenizer. An
            encoder given by name becomes a classifier of the data's classes, with a new head for
            each seed.
        data: as for :func:`~pyro_blora.load_task`: a CSV file, a data frame, a
            ``datasets.Dataset``, or the name of a task; a ``Task`` is taken as it is.
        methods: the rows: names of :data:`~pyro_blora.methods.METHODS`, pairs ``"PRIOR+GUIDE"``,
            names of ``own``, or ``"KIND:NAME"`` for a view of one of them: ``split``, with a
            temperature from an eighth of the training items; ``mean``, the posterior mean;
            ``linearized``, draws of the linearized network; ``distilled``, the posterior mean with
            a temperature from the draws. Differences are taken to the first one.
        own: your own methods, which take the place of known ones of the same names.
        seeds: every method runs once for each.
        num_steps: optimizer steps.
        max_train: as in ``load_task``.
        max_test: as in ``load_task``.
        data_dir: as in ``load_task``.
        rank: as in :class:`~pyro_blora.BayesianLoRA`.
        target_modules: as in :class:`~pyro_blora.BayesianLoRA`.
        num_samples: posterior draws of a prediction, for methods without a number of their own.
        precision: as in ``fit``.
        outside: questions out of scope, as for :meth:`Task.outside <pyro_blora.data.Task.outside>`.
            The table then has the AUROC by which the entropy, or of numbers the standard deviation,
            tells them from the test items.
        likelihood: of labels that are not one class or option of each row; rows then stay as they
            are. Default: by the data and the network's head.
        out: a folder for the results. After an interruption the same call continues from there;
            with other methods or seeds it trains what is missing. Default: nothing is written.
        callback: called with each row when it is done, and first with those that ``out`` has.
        training: further options of ``fit``, for all methods, but none that reads validation items.

    Raises:
        ConfigurationError: a method is unknown, an option would have no effect or read other
            labels, or ``out`` has results of other settings.
        DataError: the data cannot be used.

    Example::

        table = compare("bert-base-uncased", "reviews.csv", max_train=400)
        print(table)  # accuracy, ECE, NLL, Brier score, differences with their errors
        table.plot().savefig("reliability.png")
    """
    entries = {n: entry(n, own) for n in ([methods] if isinstance(methods, str) else methods)}
    if not entries or not len(seeds):
        raise ConfigurationError("methods and seeds must not be empty; name at least one of each.")
    if reads := {"validation", "keep_best", "patience"} & training.keys():
        raise ConfigurationError(
            f"All methods must have the same labels, got {min(reads)}=; use fit for it."
        )
    limits: dict[str, Any] = {"max_train": max_train, "max_test": max_test}
    given = data if isinstance(data, Task) else None
    if given and (data_dir, *limits.values()) != (None, None, None):
        raise ConfigurationError(
            "A Task must come without data_dir and limits, which are for load_task, got "
            f"{limits} and data_dir={data_dir!r}."
        )
    head = CLASS if isinstance(network, str) else kind_of_head(network[0])
    source: dict[str, Any] = {"data_dir": data_dir, "max_validation": 0}  # no row reads any
    source["as_rows"] = likelihood is not None or head not in (CLASS, TEXT)
    whole = given or load_task(data, **source)
    if likelihood is not None and whole.template is not None:
        raise ConfigurationError(
            f"likelihood= must have rows of data, got {whole!r}, whose items have their own; leave "
            "it out, or pass the rows themselves, such as a data set of datasets."
        )
    tasks = {n: given or load_task(data, **source, seed=n, **limits) for n in map(int, seeds)}
    task = next(iter(tasks.values()))
    split = next((each.name for each in entries.values() if each.view.holds_out), None)
    share = training.get("held_out", MultipleChoice.held_out)
    if split and not all(hold_out(each.train, share)[1] for each in tasks.values()):
        raise ConfigurationError(
            f"{split} must have items to hold out for its temperature, got none of "
            f"{len(task.train)} with held_out={share}; give more rows, or leave held_out out."
        )
    if not task.test:
        raise ConfigurationError(f"{task!r} must have test items; give more rows.")
    options: dict[str, Any] = {"num_steps": num_steps, "rank": rank, "num_samples": num_samples}
    options |= {"target_modules": target_modules, "precision": choose_precision(precision)}
    options |= training
    settings: dict[str, Any] = {"network": network, "task": task.name, **limits, **options}
    settings["data"] = _digest((whole.template, whole.train, whole.validation, whole.test))
    others = None if outside is None else task.outside(outside)
    if others is not None:
        settings["outside"] = _digest(others)
    if likelihood is not None:
        settings["likelihood"] = repr(likelihood)
    settings["methods"] = {each.method.name: _settings(each.method) for each in entries.values()}
    settings.pop("progress", None)
    name = network if isinstance(network, str) else type(network[0]).__name__
    title = f"{name} on {task.name}: {len(task.train)} training and {len(task.test)} test items"
    folder = None if out is None else Path(out)
    done: dict[tuple[str, int], Row] = {}
    if folder is not None:
        check_folder(folder)
        settings |= _content(network)
        done = {(row.method, row.seed): row for row in read(settings, folder)}
    keys = list(product(entries, tasks))
    for key in keys:
        if callback and key in done:
            callback(done[key])
    pair: Any = None if isinstance(network, str) else network
    shared = None  # of rows that are no items
    if task.template is None:
        shared = likelihood or usual_likelihood(pair and pair[0], task.test[0])
        one, kind = shared.has_classes, type(shared).__name__
        for each in entries.values():
            needs_one = each.view.linearized or each.method.linearized
            distills = each.view.distilled and not shared.is_categorical
            if distills or (needs_one and not one):
                raise ConfigurationError(
                    f"{each.name} must have {'one class of each row' if needs_one else 'classes'}, "
                    f"got {kind}; leave it out, or name a row such as split:lora."
                )
        if outside is not None and shared.is_categorical and not one:
            raise ConfigurationError(
                f"outside= must have one class or number of each row, got {kind}; leave it out."
            )
    for seed, task in tasks.items():
        missing = [each for name, each in entries.items() if (name, seed) not in done]
        if not missing:
            continue
        if isinstance(network, str) and (pair is None or is_classifier(pair[0])):
            # anew, for a head of this seed, with the names in all rows, of which it may see a few
            parts: list[Any] = [p for p in (whole.train, whole.validation, whole.test) if p]
            rows: Any = ConcatDataset(parts)
            names = shared.output_names(rows) if shared else task.test[0].choices
            pair = load_for(network, len(names), seed, *(shared.heads[:1] if shared else ()))
            if shared and not logit_names(pair[0]):
                pair[0].config.id2label = dict(enumerate(names))
        net, words = pair
        collate = shared.collator(words, task.test[0]) if shared else task.collator(words, net=net)
        how: Any = {"collate": collate, "outside": others, "likelihood": shared, "seed": seed}
        for row in train_and_score(net, task, missing, **how, **options):
            done[row.method, seed] = row
            if folder is not None:
                write(list(done.values()), settings, folder)
            if callback:
                callback(row)
    comparison = Comparison([done[key] for key in keys], title)
    if folder is not None and "ece" in comparison.rows[0].metrics:
        save_figure(comparison.plot(), folder / DIAGRAM)
    return comparison


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _content(network: str | tuple[nn.Module, Any]) -> dict[str, Any]:
    """What tells a network and its tokenizer from others of their name, without loading them."""
    if not isinstance(network, str):
        net, tokenizer = network
        config: Any = getattr(net, "config", None)
        weights = hashlib.sha256((config.to_json_string() if config else "").encode())
        for name, tensor in net.state_dict().items():
            weights.update(name.encode())
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                weights.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
        words |= {"truncation": None, "padding": None}  # which each call sets
        kinds = (tokenizer.special_tokens_map, tokenizer.model_max_length)
        sides = (tokenizer.truncation_side, tokenizer.padding_side)
        tokens = _digest((sorted(words.items()), kinds, sides))
        return {"network": [type(net).__name__, weights.hexdigest()], "tokenizer": tokens}
    place = Path(network)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    files = [f for f in files if f.suffix in _FILES and f.is_file() and f.stat().st_size]
    return {f.name: hashlib.sha256(np.memmap(f, mode="r").data).hexdigest() for f in files}


def _settings(method: Method) -> str:
    parts: list[Any] = [method]
    if isinstance(method.guide, FunctionType):  # whose repr does not say what it does
        code, read = method.guide.__code__, getclosurevars(method.guide)
        constants = [each for each in code.co_consts if not isinstance(each, CodeType)]
        parts += [code.co_code.hex(), code.co_names, constants, read.nonlocals, read.globals]
        parts += [method.guide.__defaults__, method.guide.__kwdefaults__]
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(map(repr, parts)))  # differ in each process


def train_and_score(
    net: nn.Module,
    task: Task,
    entries: Sequence[Entry],
    *,
    collate: Collate,
    outside: Any,
    seed: int,
    num_samples: int,
    rank: int | None,
    target_modules: str | Sequence[str] | None,
    likelihood: Likelihood | None,
    precision: str,
    **training: Any,
) -> Iterator[Row]:
    """The rows of entries under one seed, with one training for those that share it.

    ``num_samples`` is for methods without a number of their own; ``training`` has options of
    ``fit``.
    """
    data = {"test": task.test} | ({"outside": outside} if outside else {})
    groups: dict[tuple[str, bool], list[Entry]] = {}
    for each in entries:
        groups.setdefault((each.method.name, each.view.holds_out), []).append(each)
    for (_, split), group in groups.items():
        draws = group[0].method.draws(default=num_samples)
        torch.manual_seed(seed)
        blora = BayesianLoRA(
            net,
            method=replace(group[0].method, num_samples=draws),  # ``fit`` calibrates by these, too
            rank=rank,
            target_modules=target_modules,
            likelihood=task.likelihood(collate) if likelihood is None else likelihood,
        )
        options: dict[str, Any] = {"held_out": MultipleChoice.held_out} if split else {}
        options |= {"collate": collate, "precision": precision, "seed": seed, **training}
        try:
            fitted = fit(blora, task.train, **options)
            for each in sorted(group, key=lambda each: each.view.distilled):  # which are the last
                if each.view.distilled:
                    blora.distill(task.train, collate, precision=precision)
                how: dict[str, Any] = {"linearized": each.view.linearized, "precision": precision}
                how |= {"num_samples": each.view.num_samples}
                how |= {"description": f"{each.name}, seed {seed}"}
                predictions = {}
                for key, items in data.items():
                    torch.manual_seed(seed)
                    predictions[key] = blora.predict_dataset(items, collate, **how)
                yield _row(each, seed, len(task.train), blora, fitted, predictions)
        finally:
            blora.unwrap()


def _row(
    entry: Entry,
    seed: int,
    num_train: int,
    blora: BayesianLoRA,
    fitted: FitResult,
    predictions: Mapping[str, tuple[Prediction, Any]],
) -> Row:
    """The row of an entry from its predictions."""
    view, likelihood, by = entry.view, blora.likelihood, "none"
    prediction, labels = predictions["test"]
    if fitted.num_held_out:
        by = f"{fitted.settings['held_out']:.3g} of training"
    if view.distilled:
        by = "draws"
    passes = prediction.num_samples
    linear = blora.method.linearized if view.linearized is None else view.linearized
    if linear and blora.method.draws(view.num_samples):
        passes = prediction.probs.shape[-1]  # a forward, and a backward for each other class
    log_probs = prediction.log_prob(labels).reshape(len(labels), -1).sum(-1)
    row = Row(
        method=entry.name,
        seed=seed,
        metrics=likelihood.metrics(prediction, labels),
        n_train=num_train,
        n_test=len(labels),
        temperature_by=by,
        passes=passes,
        train_seconds=fitted.seconds,
        trainable_parameters=blora.trainable_parameters,
        probs=prediction.mean,
        labels=labels,
        log_probs=log_probs / likelihood.num_scored(labels).double().mean(),  # of a word
        has_learned=fitted.has_learned,
    )
    if "outside" in predictions:
        doubt = "entropy" if prediction.family is None else "stddev"
        row.auroc = out_of_scope(prediction, predictions["outside"][0], by=doubt).auroc
    return row
