"""What a comparison may be asked for by name."""

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.recipes import all_recipes, recipe

__all__ = ["BASELINES", "check_method", "trained_for"]

# Plain LoRA by PEFT: at its last step, at its best validation step, and with dropout left on.
BASELINES = ("lora", "lora-best", "mc-dropout")
_SCALED = "temperature:"


def trained_for(name: str) -> str:
    """What is trained for a method: itself, or what its temperature scales.

    Example::

        >>> trained_for("temperature:blob"), trained_for("temperature"), trained_for("map")
        ('blob', 'lora', 'map')
    """
    return "lora" if name == "temperature" else name.removeprefix(_SCALED)


def check_method(name: str) -> None:
    """Raises ConfigurationError where ``name`` is no baseline, recipe or ``PRIOR+GUIDE`` pair.

    ``temperature:NAME`` is any of them with its log-probabilities scaled on validation items, and
    ``temperature`` is ``temperature:lora``.
    """
    base = trained_for(name)
    if base in BASELINES:
        return
    if "+" not in base and base not in all_recipes():
        known = (*BASELINES, "temperature", *all_recipes())
        raise ConfigurationError(f"method {base!r} is unknown; {near_miss(base, known)}.")
    recipe(base)
