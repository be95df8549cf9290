"""Every public name is documented, and the examples in the documentation are true."""

import doctest
import importlib
import inspect
import pkgutil
from typing import get_origin

import pytest
import torch
from torch import nn

import pyro_blora

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(pyro_blora.__path__, "pyro_blora.")
    if not found.name.endswith("__main__")
)


def public(owner):
    """The functions, classes and methods that the module itself defines and exports."""
    for name in getattr(owner, "__all__", ()):
        value = getattr(owner, name)
        if get_origin(value):  # an alias of types, a class to Python 3.10
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value
        if inspect.isclass(value) and value.__module__ == owner.__name__:
            for key, member in vars(value).items():
                inner = member.fget if isinstance(member, property) else member
                inner = getattr(inner, "__func__", inner)  # a class method
                if inspect.isfunction(inner) and not key.startswith("_"):
                    yield f"{name}.{key}", inner


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_exists_once_and_is_documented(name):
    owner = importlib.import_module(name)
    assert inspect.getdoc(owner)
    names = list(getattr(owner, "__all__", ()))
    assert len(names) == len(set(names))
    assert [key for key in names if not hasattr(owner, key)] == []
    assert [key for key, value in public(owner) if not (value.__doc__ or "").strip()] == []


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        owner = importlib.import_module(name)
        for test in finder.find(owner, extraglobs={"torch": torch, "nn": nn}):
            if test.examples:
                yield pytest.param(test, id=test.name)


EXAMPLES = list(examples())


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example):
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    result = runner.run(example, out=output.append)
    assert result.failed == 0, "".join(output)
