"""Multiple-choice data: where items come from, and how they become batches.

- :class:`Item` is a question with its choices; :class:`Template` makes a prompt of it;
- :func:`load_task` reads the splits of a task, out of JSON lines (:func:`read_json_lines`), the
  Hugging Face hub (:func:`read_hub`) or the embedded set ``"facts"``;
- :class:`MultipleChoiceCollator` and :class:`LabelTokensCollator` make batches of items.
"""

from pyro_blora.data.collators import LabelTokensCollator, MultipleChoiceCollator
from pyro_blora.data.hub import hub_tasks, read_hub
from pyro_blora.data.items import Item
from pyro_blora.data.json_lines import read_json_lines
from pyro_blora.data.task import Task, load_task
from pyro_blora.data.templates import Template, template_for
from pyro_blora.errors import DataError

__all__ = [
    "DataError",
    "Item",
    "LabelTokensCollator",
    "MultipleChoiceCollator",
    "Task",
    "Template",
    "hub_tasks",
    "load_task",
    "read_hub",
    "read_json_lines",
    "template_for",
]
