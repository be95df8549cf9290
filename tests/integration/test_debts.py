"""Each private name of another library that this one uses still means what it did."""

import pyro
import pytest
import tiny
import torch
from pyro.distributions import Normal
from pyro.distributions.constraints import positive
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_blora import debts


class Two(PyroModule):
    def __init__(self):
        super().__init__()
        self.plain = nn.Parameter(torch.ones(1))
        self.width = PyroParam(torch.ones(2), constraint=positive)

    def forward(self):
        return self.width


def test_a_module_and_its_parts_enter_the_context_that_is_set():
    class Counted(debts.PyroContext):
        entered = 0

        def __enter__(self):
            self.entered += 1
            super().__enter__()

    context, whole = Counted(), PyroModule("whole")
    debts.enter_through(whole, context)
    whole.part = Two()
    whole.part()
    assert context.entered == 1
    assert debts.context_of(whole.part) is context


def test_a_pyro_param_is_told_from_a_parameter_with_its_constraint():
    assert debts.pyro_params(Two()) == {"width": positive}
    assert debts.pyro_params(nn.Linear(1, 1)) == {}


def test_particles_of_an_elbo_are_in_the_plate_of_that_name():
    seen = []

    def model():
        seen.extend(frame.name for frame in pyro.poutine.runtime.get_plates())
        pyro.sample("x", Normal(0.0, 1.0))

    guide = pyro.infer.autoguide.AutoNormal(model)
    elbo = pyro.infer.Trace_ELBO(2, max_plate_nesting=0, vectorize_particles=True)
    elbo.loss(model, guide)
    assert debts.ELBO_PLATE in seen


def test_samplers_are_known_from_the_stack():
    seen = []

    def model():
        seen.append(debts.is_enumerating())
        pyro.sample("x", Normal(0.0, 1.0))

    model()
    assert seen == [False]
    initialize_model(model)
    assert seen[-1]


def test_hooks_and_parameters_of_a_module_are_found_and_replaced():
    layer = nn.Linear(2, 2)
    hooks = [lambda *_: None, lambda *_: None]
    layer.register_forward_hook(hooks[0])
    layer.register_forward_pre_hook(hooks[1])
    assert debts.hooks_of(layer) == hooks
    own, trained = layer.weight, torch.ones(2, 2, requires_grad=True) * 2
    debts.slots_of(layer)["weight"] = trained
    assert layer.weight is trained
    debts.slots_of(layer)["weight"] = own
    assert layer.weight is own


def test_compiled_modules_are_known():
    layer, in_place, decorated = (nn.Linear(2, 2) for _ in range(3))
    assert not debts.is_compiled(layer)
    in_place.compile()
    decorated.forward = torch.compile(decorated.forward)
    assert all(map(debts.is_compiled, [torch.compile(layer), in_place, decorated]))


def test_the_checkpointing_function_of_a_block_is_wrapped():
    net, called = tiny.llama(), []
    (getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable)()
    net.train()
    blocks = [m for m in net.modules() if hasattr(m, "gradient_checkpointing")]
    net.get_input_embeddings().requires_grad_(True)

    def wrap(checkpoint):
        return lambda *args, **options: [called.append(1), checkpoint(*args, **options)][1]

    ids = torch.ones(1, 3, dtype=torch.long)
    with debts.checkpointing_through(blocks, wrap):
        net(ids)
    assert len(called) == net.config.num_hidden_layers
    net(ids)
    assert len(called) == net.config.num_hidden_layers


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_of_a_network_is_told(implementation):
    net = tiny.llama(attn_implementation=implementation)
    assert debts.attention_of(net) == implementation
    assert debts.attention_of(nn.Linear(1, 1)) is None


def test_the_experts_of_a_network_are_told():
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    net = MixtralForCausalLM(MixtralConfig(**shape, **heads))
    net.set_experts_implementation("eager")
    assert debts.experts_of(net) == "eager"


def test_a_trainer_uses_one_gpu(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path))
    arguments._n_gpu = 4
    debts.use_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_an_offloaded_module_is_known_and_where_it_computes():
    from accelerate import cpu_offload

    layer = nn.Sequential(nn.Linear(2, 2))
    assert not debts.is_offloaded(layer[0])
    assert debts.execution_device(layer[0]) is None
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert debts.is_offloaded(layer[0])
    assert debts.execution_device(layer[0]) == torch.device("cpu")
