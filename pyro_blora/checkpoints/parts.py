"""A prior, a guide and a likelihood as a file has them: a name, an import path and options."""

import functools
import importlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyro.infer.autoguide as autoguide
from torch import nn

import pyro_blora.guides as guides
import pyro_blora.likelihoods as likelihoods
import pyro_blora.models as models
from pyro_blora.errors import CheckpointError, first_line
from pyro_blora.guides import SiteGuide
from pyro_blora.likelihoods import Likelihood
from pyro_blora.models import UpdateModel
from pyro_blora.options import Options

__all__ = ["describe", "describe_guide", "rebuild"]


@dataclass(frozen=True)
class _Noun:
    contract: type
    homes: tuple[ModuleType, ...]  # whose public names may be made without being trusted


_NOUNS = {
    "prior": _Noun(UpdateModel, (models,)),
    "guide": _Noun(SiteGuide, (guides, autoguide)),
    "likelihood": _Noun(Likelihood, (likelihoods,)),
}


def describe(part: Any) -> dict[str, Any]:
    """Name, module and options of a part, or those of a mapping of parts by group.

    The module is left out for a class of this library; the options are ``None`` where JSON cannot
    hold them.
    """
    if isinstance(part, Mapping):
        return {"by_group": {key: describe(each) for key, each in part.items()}}
    return _described(type(part), part.options())


def describe_guide(family: Any, guide: nn.Module) -> dict[str, Any]:
    """The same of a guide family, or of what makes a guide of a model.

    That is a class, a function, or a ``functools.partial`` of one.

    Args:
        family: as it was given.
        guide: the guide itself: where the user has put another in its place, its class counts.
    """
    if isinstance(family, SiteGuide | Mapping):
        ours = type(guide).__module__.startswith("pyro_blora.")
        return describe(family) if ours else _described(type(guide), {})
    options: Any = {}
    if isinstance(family, functools.partial):
        family, options = family.func, None if family.args else family.keywords
    if isinstance(family, type) and not isinstance(guide, family):
        family, options = type(guide), {}
    return _described(family, options)


def _described(made: Any, options: Any) -> dict[str, Any]:
    name = getattr(made, "__qualname__", type(made).__qualname__)
    described: dict[str, Any] = {"name": name}
    home = next((h for n in _NOUNS.values() for h in n.homes if _public(h, name) is made), None)
    if home is None:
        described["module"] = getattr(made, "__module__", type(made).__module__)
    elif home is autoguide:
        described["module"] = home.__name__
    try:
        return {**described, "options": json.loads(json.dumps(options))}
    except (TypeError, ValueError):
        return {**described, "options": None}


def _public(home: ModuleType, name: str) -> Any:
    return getattr(home, name) if name in home.__all__ else None


def rebuild(
    noun: str, said: Mapping[str, Any], given: Any = None, *, trust_remote_code: bool = False
) -> Any:
    """The part, or the mapping of parts by group, that :func:`describe` described.

    Args:
        noun: ``"prior"``, ``"guide"`` or ``"likelihood"``.
        said: the description.
        given: the user's own: its class, which is made with the saved options; or an object. Of an
            object whose class is the saved one, options that differ are replaced by the saved ones,
            with a warning; of a likelihood they win. An object of another class is taken as it is.
        trust_remote_code: whether a class that is not of this library may be imported.

    Raises:
        CheckpointError: the part cannot be made: its class is not of this library and was neither
            passed nor is trusted, or does not take the saved options.
    """
    if isinstance(given, Mapping) or "by_group" in said:
        return _by_group(noun, said.get("by_group"), given or {}, trust_remote_code)
    name, module, options = (said.get(key) for key in ("name", "module", "options"))
    if not isinstance(name, str) or not isinstance(options, dict | None):
        raise CheckpointError(f"The file's {noun} has no name or no options; save it again.")
    if given is None:
        given = _found(noun, name, module, trust_remote_code)
    elif not isinstance(given, type):
        same = name.rpartition(".")[2] == type(given).__name__
        if noun == "likelihood" or not same or not isinstance(given, Options):
            return given
        now: dict[str, Any] = given.options()
        own = json.loads(json.dumps(now, default=repr))
        saved = own if options is None else own | options
        if saved == own:
            return given
        differ = [key for key in saved if key not in own or saved[key] != own[key]]
        told = [f"{key}={saved[key]!r} for {own.get(key)!r}" for key in differ]
        warnings.warn(
            f"{noun}={given!r}: the adapter's saved options are taken, {', '.join(told)}; pass "
            f"{noun}={type(given).__name__}, the class, to have them without this warning.",
            stacklevel=5,
        )
        given, options = type(given), {**now, **{key: saved[key] for key in differ}}
    if options is None:
        raise CheckpointError(
            f"The options of the {noun} {name} could not be written to a file; pass {noun}= with "
            "an object like the one that was saved."
        )
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if noun == "guide" and not (isinstance(given, type) and issubclass(given, SiteGuide)):
        return functools.partial(given, **options) if options else given
    try:
        return given(**options)
    except Exception as error:  # a spoiled option may raise anything
        raise CheckpointError(
            f"The {noun} {name} cannot be made from its saved options ({first_line(error)})."
        ) from error


def _by_group(noun: str, said: Any, given: Any, trust_remote_code: bool) -> dict[str, Any]:
    if not isinstance(said, dict) or not all(isinstance(each, dict) for each in said.values()):
        raise CheckpointError(
            f"{noun}={given!r}, but the adapter was saved with one for all groups."
        )
    if not isinstance(given, Mapping) or not given.keys() <= said.keys():
        raise CheckpointError(
            f"{noun}={given!r}, but the adapter was saved with those of {[*said]}."
        )
    return {
        key: rebuild(noun, each, given.get(key), trust_remote_code=trust_remote_code)
        for key, each in said.items()
    }


def _found(noun: str, name: str, module: Any, trust_remote_code: bool) -> Any:
    """A class by its name: of this library or of Pyro; or imported, where that is trusted."""
    kind, made = _NOUNS[noun], None
    for home in kind.homes:
        if module in (None, home.__name__):
            made = made or _public(home, name)
    if made is None and not (trust_remote_code and isinstance(module, str)):
        where = f"of {module}" if module else "of another library"
        raise CheckpointError(
            f"The {noun} {name!r} is {where}; pass {noun}= with the class or an object like the "
            "one that was saved"
            + (f", or trust_remote_code=True to import {module}." if module else ".")
        )
    if made is None:
        try:
            made = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except Exception as error:  # the module's own code may raise anything
            raise CheckpointError(
                f"The {noun} {name!r} cannot be imported from {module} ({first_line(error)}); "
                f"pass {noun}= with the class or an object like the one that was saved."
            ) from error
    right = isinstance(made, type) and issubclass(made, kind.contract)
    if not right and not (noun == "guide" and callable(made)):
        raise CheckpointError(f"The file's {noun}, {name!r}, is no {kind.contract.__name__}.")
    return made
