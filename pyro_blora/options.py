"""Constructor arguments as attributes, for checkpoints and ``repr``, and checks of arguments."""

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pyro_blora.errors import ConfigurationError

if TYPE_CHECKING:
    import torch


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

    They are stored before the constructor runs; modules among them are not registered as
    submodules. An argument annotated as a ``Literal`` must have one of its values.
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


PRECISIONS = ("auto", "float32", "bfloat16")


def check_precision(name: str) -> str:
    """Returns ``name``, or raises ConfigurationError unless it is one of ``PRECISIONS``."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"precision must be one of {PRECISIONS}, got {name!r}.")
    return name


def choose_precision(name: str, device: "str | torch.device | None" = None) -> str:
    """The precision that ``"auto"`` means on a device; any other name is returned as is.

    It means bfloat16 on a GPU or a CPU with native bfloat16 (AMX, AVX512_BF16), else float32.
    """
    if check_precision(name) != "auto":
        return name
    import torch  # not at the top, so that a command checks its options without loading torch

    place = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return "bfloat16" if _bfloat16_pays(torch.device(place).type) else "float32"


def _bfloat16_pays(kind: str) -> bool:
    import torch

    if kind == "cpu":
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
        found = capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(getattr(torch, kind, None), "is_bf16_supported", None)
    return supported is not None and bool(supported())
