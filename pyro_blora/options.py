"""Objects that remember their constructor's arguments, for checkpoints and for ``repr``."""

import inspect
import math
from typing import Any

from pyro_blora.errors import ConfigurationError


class Options:
    """Mixin of priors, guides and likelihoods: each argument is kept under its own name."""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments and their values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def check_choice(self, option: str, known: tuple[str, ...]) -> None:
        """An option must have one of its known values."""
        if getattr(self, option) not in known:
            raise ConfigurationError(
                f"{type(self).__name__}: {option} must be one of {known}, got "
                f"{getattr(self, option)!r}."
            )

    def check_positive(self, *options: str) -> None:
        """An option, and each part of one of several parts, must be positive and finite."""
        for option in options:
            value = getattr(self, option)
            parts = value if isinstance(value, tuple | list) else (value,)
            if not all(0 < part < math.inf for part in parts):
                raise ConfigurationError(
                    f"{type(self).__name__}: {option} must be positive and finite, got {value!r}."
                )

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.options().items()
            if value is not parameters[name].default and value != parameters[name].default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def check_kind(option: str, value: object, kind: type) -> None:
    """An option must be an object of its kind, not a class of it."""
    if not isinstance(value, kind):
        made = " Pass an object, not the class." if isinstance(value, type) else ""
        given = repr(value).splitlines()[0]  # that of a network has hundreds
        raise ConfigurationError(f"{option}={given} is not of {kind.__name__}.{made}")
