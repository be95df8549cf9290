"""Private names of other libraries whose change would be silent still mean what they did.

Other tests fail where one of the rest changes: those of packing, checkpointing, heads, devices.
"""

import torch
from torch import nn
from transformers import TrainingArguments

from pyro_blora import debts


def test_compiled_modules_are_known():
    layer, in_place, decorated = (nn.Linear(2, 2) for _ in range(3))
    assert not debts.is_compiled(layer)
    in_place.compile()
    decorated.forward = torch.compile(decorated.forward)
    assert not debts.is_made_by_compile(in_place)
    assert debts.is_made_by_compile(torch.compile(layer))
    assert all(map(debts.is_compiled, [torch.compile(layer), in_place, decorated]))


def test_a_trainer_uses_one_gpu(tmp_path):
    arguments = TrainingArguments(str(tmp_path))
    arguments._n_gpu = 4
    debts.use_one_gpu(arguments)
    assert arguments.n_gpu == 1
