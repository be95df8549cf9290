"""Multiple-choice data: where items come from, and how they become batches.

- :class:`Item` is a question with its choices; :class:`Template` makes a prompt of it;
- :func:`load_task` reads the splits of a task, out of JSON lines (:func:`read_json_lines`), the
  Hugging Face hub (:func:`read_hub`) or the embedded set ``"facts"`` (:func:`facts_items`);
- :class:`MultipleChoiceCollator` and :class:`LabelTokensCollator` make batches of items.
"""

from .collators import LabelTokensCollator, MultipleChoiceCollator
from .facts import facts_items
from .hub import hub_tasks, read_hub
from .items import DataError, Item
from .json_lines import read_json_lines
from .task import Task, load_task, task_names
from .templates import Template, template_for

__all__ = [
    "DataError",
    "Item",
    "LabelTokensCollator",
    "MultipleChoiceCollator",
    "Task",
    "Template",
    "facts_items",
    "hub_tasks",
    "load_task",
    "read_hub",
    "read_json_lines",
    "task_names",
    "template_for",
]
