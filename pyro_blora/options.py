"""Objects that remember their constructor's arguments, for checkpoints and for ``repr``."""

import inspect
from typing import Any

__all__ = ["Options"]


class Options:
    """Mixin of priors, guides and likelihoods: each argument is kept under its own name."""

    def options(self) -> dict[str, Any]:
        """The constructor's arguments and their values."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.options().items()
            if value is not parameters[name].default and value != parameters[name].default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"
