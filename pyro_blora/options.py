"""Constructor arguments as attributes, for checkpoints and ``repr``."""

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral
from typing import Any, Literal, get_args, get_origin

from pyro_blora.errors import ConfigurationError, check_count, check_positive


def _storing(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that first stores its arguments as attributes, as :class:`Options` says."""
    signature = inspect.signature(init)
    with suppress(NameError):  # a name that is imported only for the type checker
        signature = inspect.signature(init, eval_str=True)

    @functools.wraps(init)
    def run(self: Any, *arguments: Any, **options: Any) -> None:
        with suppress(TypeError):  # which the constructor itself will raise
            bound = signature.bind(self, *arguments, **options)
            bound.apply_defaults()
            for name, value in [*bound.arguments.items()][1:]:
                kind = signature.parameters[name].annotation
                if get_origin(kind) is Literal and value not in (known := get_args(kind)):
                    raise ConfigurationError(
                        f"{type(self).__name__}: {name} must be one of {known}, got {value!r}."
                    )
                whole = isinstance(value, Integral) and not isinstance(value, bool)
                vars(self)[name] = int(value) if whole else value  # also of NumPy's
        init(self, *arguments, **options)

    return run


class Options:
    """Mixin of priors, guides and likelihoods that stores constructor arguments as attributes.

    They are set before the constructor runs, and modules among them are not registered. An argument
    annotated as a ``Literal`` must have one of its values.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = _storing(vars(cls)["__init__"])  # type: ignore[method-assign]

    def register_buffer(self, name: str, *arguments: Any, **options: Any) -> None:
        """Registers a buffer, which replaces a stored argument of the same name."""
        vars(self).pop(name, None)
        super().register_buffer(name, *arguments, **options)  # type: ignore[misc]

    def options(self) -> dict[str, Any]:
        """The constructor's arguments and their values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def check_positive(self, *options: str) -> None:
        """Checks that these options are positive and finite, and that a rank is a whole number."""
        for option in options:
            value, name = getattr(self, option), f"{type(self).__name__}: {option}"
            check_positive(name, value)
            if option == "rank":
                for part in value if isinstance(value, tuple | list) else (value,):
                    check_count(name, part)

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.options().items()
            if value is not parameters[name].default and value != parameters[name].default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
