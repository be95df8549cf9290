"""The embedded commonsense set ``facts``, a file a split: ``load_task("facts")`` reads it.

Short hand-written English questions about sizes, materials, uses, animals, places, time, causes and
more, with four choices of which exactly one is right. No fact of a relation is in two splits, right
labels are balanced, and about half of the test items use a wording that no other split has. An id
such as ``"facts-test-0042-uses.2"`` names the relation and the number of its wording.
"""
