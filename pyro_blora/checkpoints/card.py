"""The model card of a saved adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from pyro_blora.posterior.posterior import Posterior

CARD = "README.md"
MARK = "<!-- save_pretrained overwrites this file; remove this line to keep the file. -->"


def model_card(config: Mapping[str, Any], posterior: Posterior, place: str) -> str:
    """The text of ``README.md`` with the hub's header; its example loads the adapter ``place``."""
    model, method = posterior.model, posterior.method
    base, kind = config["base_model"], config["base"]["class"]
    header = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="pyro_blora",
        tags=["bayesian-lora", "lora", "uncertainty", "pyro"],
    )
    data = model.likelihood.num_data
    family, name = method.guide, config["guide"].get("name")  # absent if given by group
    rows = {
        "base": f"{base or 'a network without a name on the hub'} ({kind})",
        "layers": ", ".join(f"{g.n} {g.name} ({g.d_out} x {g.d_in})" for g in model.groups),
        "heads trained as points": ", ".join(config["modules_to_save"]),
        "prior": repr(method.prior),
        "guide": repr(family) if name in (None, type(family).__qualname__) else name,
        "likelihood": repr(model.likelihood),
        "training examples": "" if data is None else f"{data:,}",
        **config["notes"],
    }
    count = config["base"].get("num_labels")
    page = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return page.from_string(Path(__file__).with_name("card.md").read_text("utf-8")).render(
        header=header.to_yaml(),
        rows={k: " ".join(f"{v}".split()).replace("|", "\\|") for k, v in rows.items() if v != ""},
        base=base,
        kind=kind,
        place=place,
        classes=f", with num_labels={count}" if count else "",
        predicts=model.likelihood.predicts,
        classes_of_labels=model.likelihood.is_categorical,
    )


class Training(Protocol):
    """The result of a training run as the card reads it; ``fit`` returns one."""

    history: list[dict[str, float]]
    validation: list[tuple[int, float]]
    best_step: int | None
    settings: Mapping[str, Any]


def figures_of(result: Training) -> dict[str, str]:
    """The figures and the settings of a training for an adapter's notes."""
    rows = {"steps": f"{len(result.history):,}"}
    given = {n: getattr(v, "__name__", v) for n, v in result.settings.items() if v is not None}
    if given:
        rows["settings"] = ", ".join(f"{name}={value}" for name, value in given.items())
    for step, nll in result.validation:  # keeps the last one
        rows["validation NLL"] = f"{nll:.4g} at step {step}, without a temperature"
    if result.best_step is not None:
        best = dict(result.validation)[result.best_step]
        rows["validation NLL"] += f"; lowest {best:.4g} at step {result.best_step}"
    return rows
