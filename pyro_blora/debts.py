"""The private names of other libraries that this one depends on, each in one function.

Every function says why it is needed, on which release it was written, and what breaks when the name
changes; ``tests/integration/test_debts.py`` runs each of them, so that a new release fails there
first. Methods that a subclass overrides (``nn.Module._apply``, ``Trainer._save``, the protocol of a
``Distribution``) are in the subclass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

#: Pyro 1.9: the context that a ``PyroModule`` enters when it is called, in which it reads its
#: parameters from the store. :class:`~pyro_blora.posterior.store.OwnTensors` is a subclass. Without
#: it two adapters of one process would train one another's tensors.
PyroContext = _Context

#: Pyro 1.9: the name of the plate of an ELBO's vectorized particles. With another name every
#: particle would see the whole batch, which is correct but slower by the number of particles.
ELBO_PLATE = "num_particles_vectorized"


def enter_through(module: PyroModule, context: _Context) -> None:
    """Makes ``module`` enter ``context`` when it is called: ``_pyro_context`` of Pyro 1.9."""
    # Submodules that are assigned afterwards share it. Without it ``PyroContext`` has no effect.
    module._pyro_context = context


def context_of(module: PyroModule) -> _Context:
    """The context in which a module reads the parameter store: ``_pyro_context`` of Pyro 1.9."""
    # A module that is not called must enter it to see tensors loaded by the store.
    return module._pyro_context


def pyro_params(module: nn.Module | None) -> dict[str, Constraint]:
    """The constraint of each ``PyroParam`` of a module by name: ``_pyro_params`` of Pyro 1.9."""
    # Without it stray parameters are not refused, and AutoLaplaceApproximation does not load.
    return {name: made[0] for name, made in getattr(module, "_pyro_params", {}).items()}


def is_enumerating() -> bool:
    """Whether HMC, NUTS or an enumeration runs the model now: ``_PYRO_STACK`` of Pyro 1.9."""
    # Without it they would sample a density that changes with every call, and be silently wrong.
    return any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """All hooks before and after a module's forward: ``_forward_hooks`` of torch 2.10."""
    # Without it a layer could be adapted twice, and a head's hook would see fewer positions.
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def slots_of(module: nn.Module) -> dict[str, Any]:
    """The dictionary of a module's parameters, to write to: ``_parameters`` of torch 2.10."""
    # A trained head is a tensor with a history, which ``setattr`` refuses in a parameter's place.
    return module._parameters


def is_made_by_compile(module: nn.Module) -> bool:
    """Whether ``torch.compile`` returned this module, by ``_orig_mod`` of torch 2.10."""
    # Without it an adapter would be saved under the names of the layers within.
    return hasattr(module, "_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs from a graph, by any of three names of torch 2.10's compiler."""
    # Such a graph does not see a replaced forward, so that no block in it can be skipped.
    return (
        module._compiled_call_impl is not None
        or is_made_by_compile(module)
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


@contextmanager
def checkpointing_through(
    blocks: Sequence[Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Wraps the function that checkpoints: ``_gradient_checkpointing_func`` of transformers 5.6."""
    # Without it backward recomputes a block without its updates, and gradients are silently wrong.
    active = (block for block in blocks if block.gradient_checkpointing and block.training)
    before = {block: block._gradient_checkpointing_func for block in active}
    try:
        for block, checkpoint in before.items():
            block._gradient_checkpointing_func = wrap(checkpoint)
        yield
    finally:
        for block, checkpoint in before.items():
            block._gradient_checkpointing_func = checkpoint


def attention_of(net: nn.Module) -> str | None:
    """How the network computes attention: ``_attn_implementation`` of transformers 5.6."""
    # Eager attention adds its mask to the scores, and the others take a mask of booleans.
    return getattr(getattr(net, "config", None), "_attn_implementation", None)


def use_one_gpu(arguments: Any) -> None:
    """Keeps a ``Trainer`` from using DataParallel: ``_n_gpu`` of transformers 5.6."""
    # DataParallel would copy the adapter to every card, but not the network that it holds.
    arguments._n_gpu = min(arguments.n_gpu, 1)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which an offloaded module computes: ``_hf_hook`` of accelerate 1.13."""
    # Its weights are on the meta device between two passes. Without it updates land on the CPU.
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module has its weights only during a pass: ``_hf_hook`` of accelerate 1.13."""
    # Without it an offloaded head would be trained on the meta device.
    away: list[Tensor] = [p for p in module.parameters(recurse=False) if p.is_meta]
    return bool(away) and hasattr(module, "_hf_hook")
