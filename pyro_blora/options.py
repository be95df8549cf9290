"""Objects that remember their constructor's arguments, for checkpoints and for ``repr``."""

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

from pyro_blora.errors import ConfigurationError


def _keeping(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose arguments are attributes before it runs, as :class:`Options` says."""
    signature = inspect.signature(init)
    with suppress(NameError):  # of what is imported for the type checker alone
        signature = inspect.signature(init, eval_str=True)

    @functools.wraps(init)
    def run(self: Any, *arguments: Any, **options: Any) -> None:
        with suppress(TypeError):  # which the constructor itself raises
            bound = signature.bind(self, *arguments, **options)
            bound.apply_defaults()
            for name, value in [*bound.arguments.items()][1:]:
                kind = signature.parameters[name].annotation
                if get_origin(kind) is Literal and value not in (known := get_args(kind)):
                    raise ConfigurationError(
                        f"{type(self).__name__}: {name} must be one of {known}, got {value!r}."
                    )
                vars(self)[name] = value
        init(self, *arguments, **options)

    return run


class Options:
    """Mixin of priors, guides and likelihoods, of which an argument is an attribute of its name.

    It is there before the constructor runs. One whose type is a ``Literal`` must be one of its
    values. Modules among the arguments are not registered as submodules.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = _keeping(vars(cls)["__init__"])  # type: ignore[method-assign]

    def register_buffer(self, name: str, *arguments: Any, **options: Any) -> None:
        """As everywhere; an argument of that name gives way."""
        vars(self).pop(name, None)
        super().register_buffer(name, *arguments, **options)  # type: ignore[misc]

    def options(self) -> dict[str, Any]:
        """The constructor's arguments and their values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def check_positive(self, *options: str) -> None:
        """Each of these options must be positive and finite, and a rank a whole number."""
        for option in options:
            value, told = getattr(self, option), f"{type(self).__name__}: {option}"
            check_positive(told, value)
            if option == "rank":
                for part in value if isinstance(value, tuple | list) else (value,):
                    check_count(told, part)

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.options().items()
            if value is not parameters[name].default and value != parameters[name].default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def check_count(option: str, value: object, least: int = 1, remedy: str = "") -> None:
    """A count must be a whole number that is not too small; a remedy ends the message."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        wanted = f"at least {least}" if whole else f"a whole number, {least} or more"
        raise ConfigurationError(f"{option} must be {wanted}, got {value!r}{remedy}.")


def check_positive(option: str, value: object) -> None:
    """A number, and each part of one of several parts, must be positive and finite."""
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, bool) or not (isinstance(part, Real) and 0 < float(part) < math.inf):
            raise ConfigurationError(f"{option} must be positive and finite, got {value!r}.")


def check_kind(option: str, value: object, kind: type) -> None:
    """An option must be an object of its kind, not a class of it."""
    if not isinstance(value, kind):
        made = " Pass an object, not the class." if isinstance(value, type) else ""
        given = repr(value).splitlines()[0]  # that of a network has hundreds
        raise ConfigurationError(f"{option}={given} is not of {kind.__name__}.{made}")
