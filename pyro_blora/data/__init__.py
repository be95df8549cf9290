"""Data: where items and rows come from, and how they become batches."""

from pyro_blora.data.hub import read_hub
from pyro_blora.data.task import Task, load_task
from pyro_blora.errors import DataError
from pyro_blora.labels import Item, Template, template_for

__all__ = [
    "DataError",
    "Item",
    "Task",
    "Template",
    "load_task",
    "read_hub",
    "template_for",
]
