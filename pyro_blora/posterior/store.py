"""An adapter's tensors in Pyro's parameter store, where all adapters have the same names."""

from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import StateDict
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.utils.weak import WeakIdKeyDictionary

from pyro_blora.debts import PyroContext, context_of, pyro_params

_OWNED = WeakIdKeyDictionary()  # the tensors of all adapters that have run


def read_store(part: nn.Module) -> None:
    """Reads Pyro's parameter store, which a module otherwise does only when it is called."""
    if isinstance(part, PyroModule):
        with context_of(part):
            pass


def constraint_of(module: nn.Module | None, name: str) -> Constraint:
    """The constraint of a module's parameter: its ``PyroParam``'s, or none."""
    return pyro_params(module).get(name, constraints.real)


class OwnTensors(PyroContext):
    """The context that all modules of an adapter enter when they are called.

    Other adapters' tensors of the same names are removed from the store; tensors that
    ``ParamStore.load`` put there are copied into the adapter's own. A name for each adapter
    (``PyroModule(name=)``) would become part of every site's name and of a saved store.
    """

    def __init__(self, adapter: PyroModule) -> None:
        super().__init__()
        self._adapter = adapter
        # also without module_local_params, which may be switched on later
        self.param_state: StateDict = {"params": {}, "constraints": {}}

    def __enter__(self) -> None:
        if not self.active:
            store, local = pyro.get_param_store(), pyro.settings.get("module_local_params")
            kept = set() if local else {id(p) for p in self._adapter.parameters()}
            rest = [(name, held) for name, held in store.named_parameters() if id(held) not in kept]
            named = self._named() if rest else {}
            for name, held in rest:
                loaded = name in named and held not in _OWNED and held.shape == named[name][0].shape
                if loaded:
                    with torch.no_grad():
                        named[name][0].copy_(held)
                if loaded or held in _OWNED:
                    with suppress(KeyError):  # a tensor stored under two names is already deleted
                        del store[name]
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.active:
            _OWNED.update((parameter, None) for parameter in self._adapter.parameters())
            if pyro.settings.get("module_local_params"):  # Pyro's optimizers read the global store
                named = self._named().items()
                params, kinds = ({name: pair[i] for name, pair in named} for i in (0, 1))
                pyro.get_param_store().set_state({"params": params, "constraints": kinds})

    def _named(self) -> dict[str, tuple[Tensor, Any]]:
        """The adapter's parameters and their constraints, by their names in Pyro's store."""
        named = {}
        for path, parameter in self._adapter.named_parameters():
            parent, _, name = path.removesuffix("_unconstrained").rpartition(".")
            constraint = constraint_of(self._adapter.get_submodule(parent), name)
            named[f"{parent}.{name}"] = parameter, constraint
        return named
