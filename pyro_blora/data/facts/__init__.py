"""The embedded commonsense set ``facts``: questions made from hand-written tables of facts.

``tables/*.json`` hold the facts and the wordings, :mod:`.table` reads them, :mod:`.drafts` makes
a question with one right and three wrong answers of each fact, and :mod:`.generate` puts the
questions of a split in order.
"""

from pyro_blora.data.facts.generate import facts_items

__all__ = ["facts_items"]
