"""What a comparison may be asked for by name."""

from importlib.metadata import entry_points

from pyro_blora.errors import ConfigurationError, near_miss

__all__ = ["BASELINES", "RECIPE_NAMES", "check_method", "trained_for"]

# The keys of recipes.RECIPES, which imports torch: help and a slip of the pen need not wait for it.
RECIPE_NAMES = (
    "fisher",
    "lora",
    "map",
    "bayesian-lora",
    "bayesian-lora-factor",
    "mean-field",
    "blob",
    "scalabl",
    "b-lora-xs",
    "laplace-lora",
    "tfb",
    "ensemble",
)
# Plain LoRA by PEFT: at its last step, at its best validation step, and with dropout left on.
BASELINES = ("lora", "lora-best", "mc-dropout")


def trained_for(name: str) -> str:
    """What is trained for a method: itself, or what its temperature scales.

    Example::

        >>> trained_for("temperature:blob"), trained_for("temperature"), trained_for("map")
        ('blob', 'lora', 'map')
    """
    return "lora" if name == "temperature" else name.removeprefix("temperature:")


def check_method(name: str) -> None:
    """Raises ConfigurationError where ``name`` is no baseline, recipe or ``PRIOR+GUIDE`` pair.

    ``temperature:NAME`` is any of them with its log-probabilities scaled on validation items, and
    ``temperature`` is ``temperature:lora``.
    """
    base = trained_for(name)
    if "+" in base:
        from pyro_blora.recipes import recipe  # here, for it imports torch

        recipe(base)
        return
    plugins = (entry.name for entry in entry_points(group="pyro_blora.recipes"))
    known = (*BASELINES, *RECIPE_NAMES, *plugins)
    if base not in known:
        near = near_miss(base, (*known, "temperature"))
        raise ConfigurationError(f"method {base!r} is unknown; {near}.")
