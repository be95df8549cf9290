"""Private names of other libraries whose change would be silent still mean what they did.

Other tests fail where one of the rest changes: those of packing, checkpointing, heads, devices.
"""

import pyro
import tiny
import torch
from pyro.distributions import Normal
from pyro.infer.mcmc.util import initialize_model
from torch import nn
from transformers import TrainingArguments

from pyro_blora import debts


def test_particles_and_samplers_of_pyro_are_known():
    plates, sampled = [], []

    def model():
        plates.extend(frame.name for frame in pyro.poutine.runtime.get_plates())
        sampled.append(debts.is_enumerating())
        pyro.sample("x", Normal(0.0, 1.0))

    guide = pyro.infer.autoguide.AutoNormal(model)
    pyro.infer.Trace_ELBO(2, max_plate_nesting=0, vectorize_particles=True).loss(model, guide)
    assert debts.ELBO_PLATE in plates
    assert not any(sampled)
    initialize_model(model)
    assert sampled[-1]


def test_compiled_modules_are_known():
    layer, in_place, decorated = (nn.Linear(2, 2) for _ in range(3))
    assert not debts.is_compiled(layer)
    in_place.compile()
    decorated.forward = torch.compile(decorated.forward)
    assert all(map(debts.is_compiled, [torch.compile(layer), in_place, decorated]))


def test_the_implementation_of_attention_is_known():
    assert debts.attention_of(tiny.llama(attn_implementation="eager")) == "eager"


def test_a_trainer_uses_one_gpu(tmp_path):
    arguments = TrainingArguments(str(tmp_path))
    arguments._n_gpu = 4
    debts.use_one_gpu(arguments)
    assert arguments.n_gpu == 1
