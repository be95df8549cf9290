"""The exceptions, whose messages say what was expected, given, and what to do, and checks."""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real

PRECISIONS = ("auto", "float32", "bfloat16")


def near_miss(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: likely corrections, and all known names."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Turns the errors of a block that reads a file's content into a one-line CheckpointError."""
    try:
        yield
    except (ConfigurationError, CheckpointError):
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} cannot be used ({type(error).__name__}: {first_line(error)}): it was edited, "
            "is of another version, or does not fit a class of your own. Write it again."
        ) from error


class ConfigurationError(ValueError):
    """An option has an invalid value."""


class DataError(ValueError):
    """Data is malformed, or a task or split does not exist."""


class BatchError(ValueError):
    """A batch lacks a key, or a tensor in it has the wrong shape, type or range."""


class ParticleError(BatchError):
    """The particles cannot share the rows of a batch evenly."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the sites that caused it."""


class CheckpointError(ValueError):
    """A saved adapter is corrupt, incomplete or belongs to another base network."""


def check_count(option: str, value: object, least: int = 1, remedy: str = "") -> None:
    """Checks that a count is a whole number of at least ``least``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        wanted = f"at least {least}" if whole else f"a whole number, {least} or more"
        raise ConfigurationError(f"{option} must be {wanted}, got {value!r}{remedy}.")


def check_positive(option: str, value: object) -> None:
    """Checks that a number, or each number of a sequence, is positive and finite."""
    for part in value if isinstance(value, tuple | list) else (value,):
        if isinstance(part, bool) or not (isinstance(part, Real) and 0 < float(part) < math.inf):
            raise ConfigurationError(f"{option} must be positive and finite, got {value!r}.")


def check_kind(option: str, value: object, kind: type) -> None:
    """Checks that an option is an instance of a class, not the class itself."""
    if not isinstance(value, kind):
        remedy = " Pass an object, not the class." if isinstance(value, type) else ""
        given = repr(value).splitlines()[0]  # the repr of a network has hundreds of lines
        raise ConfigurationError(f"{option} must be of {kind.__name__}, got {given}.{remedy}")


def check_precision(name: str) -> str:
    """Returns ``name``, or raises ConfigurationError unless it is one of ``PRECISIONS``."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"precision must be one of {PRECISIONS}, got {name!r}.")
    return name
