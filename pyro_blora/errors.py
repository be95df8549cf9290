"""The exceptions of this library; each says what was given, what was expected and the fix."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def near_miss(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what was probably meant, and all there is."""
    known = sorted(set(known))
    begun = [each for each in known if each.startswith(f"{name}_")]
    close = begun or difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Within, what a file says is looked up; where it does not say so, the error is one line."""
    try:
        yield
    except (ConfigurationError, CheckpointError):
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} cannot be used ({type(error).__name__}: {first_line(error)}): it was edited, "
            "is of another version, or does not fit a class of your own. Write it anew."
        ) from error


class ConfigurationError(ValueError):
    """An option has a value that cannot work."""


class DataError(ValueError):
    """Data or a request for data is wrong; the message is one line and ends with the fix."""


class NoTargetError(ConfigurationError):
    """No layer of the network matches ``target_modules``."""


class BatchError(ValueError):
    """A batch lacks a key, or a tensor in it has the wrong shape, type or range."""


class ParticleError(BatchError):
    """The rows of a batch cannot be shared out evenly among the particles."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the sites at fault."""


class CheckpointError(ValueError):
    """A saved adapter is corrupt, incomplete or made for another base network."""
