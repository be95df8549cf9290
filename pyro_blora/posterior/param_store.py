"""Pyro's global parameter store, which knows tensors by name: an adapter runs on its own."""

from contextlib import suppress
from types import TracebackType

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.params.param_store import StateDict
from torch.distributions import constraints
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["OwnTensors"]

_OWNED = WeakIdKeyDictionary()  # every tensor that an adapter has run on


class OwnTensors(_Context):
    """What all modules of an adapter enter when they are called; it keeps to the adapter's tensors.

    Pyro takes a module's parameter from the store if the store has its name, and all adapters have
    the same names. So when the first module is called, other adapters' tensors leave the store.
    What somebody else put there stays: ``ParamStore.load`` restores an adapter as any module.
    """

    def __init__(self, adapter: PyroModule) -> None:
        super().__init__()
        self._adapter = adapter
        # whatever the mode of the store is when it runs
        self.param_state: StateDict = {"params": {}, "constraints": {}}

    def __enter__(self) -> None:
        if not self.active:
            store, local = pyro.get_param_store(), pyro.settings.get("module_local_params")
            own = set() if local else {id(p) for p in self._adapter.parameters()}
            for name, held in list(store.named_parameters()):
                if id(held) not in own and held in _OWNED:
                    with suppress(KeyError):  # of a tensor that had two names
                        del store[name]
        super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        if not self.active:
            _OWNED.update((parameter, None) for parameter in self._adapter.parameters())
            if pyro.settings.get("module_local_params"):
                self._tell_names()

    def _tell_names(self) -> None:
        """Where each module has a store of its own, Pyro's optimizers still ask the global one."""
        found = {}
        for path, parameter in self._adapter.named_parameters():
            parent, _, name = path.removesuffix("_unconstrained").rpartition(".")
            params = getattr(self._adapter.get_submodule(parent), "_pyro_params", {})
            found[f"{parent}.{name}"] = parameter, params.get(name, (constraints.real,))[0]
        params, laws = ({n: pair[i] for n, pair in found.items()} for i in (0, 1))
        pyro.get_param_store().set_state({"params": params, "constraints": laws})
