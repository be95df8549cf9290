"""Where the host waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Waits(TorchDispatchMode):
    """Counts what would stop the host until an accelerator has caught up."""

    count = 0

    def __enter__(self):
        def counted(tensor, read=torch.Tensor.tolist):
            self.count += 1
            return read(tensor)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.Tensor, "tolist", counted)  # which is not dispatched
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        self.count += name in WAITS or masked
        return func(*args, **(kwargs or {}))
