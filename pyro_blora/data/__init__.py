"""Data: where items and rows come from, and how they become batches."""

from typing import TYPE_CHECKING, Any

from pyro_blora.data.hub import hub_tasks, read_hub
from pyro_blora.data.tables import read_json_lines
from pyro_blora.data.task import Task, load_task
from pyro_blora.errors import DataError
from pyro_blora.items import Item, Template, template_for

if TYPE_CHECKING:
    from pyro_blora.likelihoods import (
        ClassificationCollator,
        LabelTokensCollator,
        MultipleChoiceCollator,
        TextCollator,
    )

__all__ = [
    "ClassificationCollator",
    "DataError",
    "Item",
    "LabelTokensCollator",
    "MultipleChoiceCollator",
    "Task",
    "Template",
    "TextCollator",
    "hub_tasks",
    "load_task",
    "read_hub",
    "read_json_lines",
    "template_for",
]


def __getattr__(name: str) -> Any:
    """Imports the collators on first use, because only they need torch."""
    if name.endswith("Collator"):
        from pyro_blora import likelihoods

        return getattr(likelihoods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
