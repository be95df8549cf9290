"""The trials of the calibration benchmark: changes to a method's settings, and which is chosen."""

import copy
import json
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

__all__ = ["base_of", "changed", "chosen_trials", "trial_key", "without_trials"]


def base_of(method: str, settings: Mapping[str, Any]) -> str:
    """The method whose training ``method`` reads."""
    return str(settings["methods"][method].get("of", method))


def changed(settings: dict[str, Any], trials: Mapping[str, int]) -> dict[str, Any]:
    """The settings with the trial that was chosen for each method."""
    settings = copy.deepcopy(settings)
    for name, index in trials.items():
        method = settings["methods"].get(name, {})
        for key, change in (method.get("trials") or [{}])[index].items():
            method[key] = {**method.get(key, {}), **change} if isinstance(change, dict) else change
    return settings


def without_trials(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings, without what else there was to try."""
    return {name: value for name, value in method.items() if name != "trials"}


def trial_key(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What a trial's line is of: a change of steps or settings, not of other trials, is another."""
    settings = without_trials(line["settings"])
    kinds = ("network", "method", "trial", "task", "seed", "steps")
    return tuple(json.dumps(part, sort_keys=True) for part in (*(line[k] for k in kinds), settings))


def chosen_trials(
    settings: dict[str, Any], trials: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str], int]:
    """The trial of each network and method with the lowest mean NLL on the development tasks.

    Trials that have not run on every development task and seed are no candidates. A network without
    tasks of its own has the choices of the first.
    """
    where = settings["development"]
    tried = {trial_key(line): line["nll"] for line in trials}
    chosen = {}
    for network, method in product(settings["networks"], settings["methods"]):
        of = network if network in where["networks"] else next(iter(where["networks"]))
        pairs = product(where["networks"][of], where["seeds"])
        runs = [{"network": of, "task": task, "seed": seed} for task, seed in pairs]
        base, means = base_of(method, settings), {}
        last = settings["methods"][method].get("state") == "from-lora"  # goes on from its last step
        for trial in range(len(settings["methods"][base].get("trials", []))):
            line = {"method": base if last else method, "trial": trial, "steps": where["steps"]}
            line["settings"] = changed(settings, {base: trial})["methods"][base]
            found = [tried.get(trial_key({**line, **run})) for run in runs]
            if all(nll is not None for nll in found):
                means[trial] = sum(nll for nll in found if nll is not None)
        if means:
            chosen[network, method] = min(means, key=means.__getitem__)
    return chosen
