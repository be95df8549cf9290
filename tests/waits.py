"""Where the host waits for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Waits(TorchDispatchMode):
    """Counts what would stop the host until an accelerator has caught up."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        self.count += name in WAITS or masked
        return func(*args, **(kwargs or {}))
