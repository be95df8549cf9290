"""What priors read of the pretrained weights of a group."""

import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.targets import LayerGroup, layer_shape

__all__ = ["dense_weight", "top_singular"]


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer or ``Conv1D``, ``(d_out, d_in)``, in torch's default dtype.

    Raises:
        ConfigurationError: the weight is quantised.
    """
    weight = module.weight
    shape = layer_shape(module)
    assert isinstance(weight, Tensor)
    assert shape is not None
    if not weight.is_floating_point() or weight.dim() != 2 or weight.numel() != shape[0] * shape[1]:
        raise ConfigurationError(
            f"{name} has a weight of {weight.dtype} and shape {tuple(weight.shape)}, whose "
            "singular directions cannot be read; take a prior that does not start from the "
            "pretrained weight, or load the network unquantised."
        )
    transposed = type(module).__name__ == "Conv1D"
    weight = weight.detach().mT if transposed else weight.detach()
    return weight.to(torch.get_default_dtype())


@torch.no_grad()
def top_singular(group: LayerGroup, left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular directions of each pretrained weight of a group.

    Args:
        group: the layers.
        left: how many left ones.
        right: how many right ones.

    Returns:
        ``(n, left, d_out)`` and ``(n, right, d_in)``, orthonormal rows of falling singular value,
        and the singular values, ``(n, min(d_out, d_in))``. Unit vectors and ones where the network
        is on the meta device.
    """
    lefts, rights, values = [], [], []
    for name, module in zip(group.module_names, group.modules, strict=True):
        weight = dense_weight(module, name)
        if weight.is_meta:
            lefts.append(torch.eye(left, group.d_out))
            rights.append(torch.eye(right, group.d_in))
            values.append(torch.ones(min(weight.shape)))
            continue
        U, S, Vh = torch.linalg.svd(weight, full_matrices=max(left, right) > min(weight.shape))
        lefts.append(U.mT[:left])
        rights.append(Vh[:right])
        values.append(S)
    return (torch.stack(lefts).contiguous(), torch.stack(rights).contiguous(), torch.stack(values))
