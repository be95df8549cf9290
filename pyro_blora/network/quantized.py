"""Reading the pretrained weights of linear layers, quantized ones included."""

import torch
from torch import Tensor, nn

from pyro_blora.debts import is_offloaded, slots_of
from pyro_blora.errors import ConfigurationError
from pyro_blora.network.targets import LayerGroup, layer_shape


def _is_of_torchao(weight: Tensor) -> bool:
    # A subclass that pretends to be a float tensor, and dequantizes itself
    return type(weight).dequantize is not Tensor.dequantize


def is_quantized(module: nn.Module) -> bool:
    """Whether the module has a weight that torchao or bitsandbytes quantized."""
    weight = slots_of(module).get("weight")
    if weight is None:
        return False
    of_bitsandbytes = hasattr(weight, "quant_state") or not weight.is_floating_point()
    return of_bitsandbytes or _is_of_torchao(weight)


def dense_weight(module: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer, ``(d_out, d_in)``, dequantized, in torch's default dtype."""
    weight, shape = _dequantized(module), layer_shape(module)
    if weight is not None and type(module).__name__ == "Conv1D":
        weight = weight.mT
    plain = weight is not None and weight.is_floating_point() and weight.element_size() > 1
    if weight is None or not plain or weight.shape != shape:
        raise ConfigurationError(
            f"{name} has no weight of {shape} floats that can be read; pass "
            "prior=KroneckerInducing(sigma=...) with a width in units of the weights, or load the "
            "network unquantized or quantized by torchao or bitsandbytes."
        )
    return weight.to(torch.get_default_dtype())


def _dequantized(module: nn.Module) -> Tensor | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if is_offloaded(module):
        from accelerate.utils import align_module_device

        with align_module_device(module):
            weight = module.weight
            assert isinstance(weight, Tensor)
    if hasattr(weight, "full_tensor"):  # a DTensor holds only a shard
        weight = weight.full_tensor()
    if getattr(weight, "quant_state", None) is not None or weight.dtype == torch.int8:
        from transformers.integrations import bitsandbytes

        weight = bitsandbytes.dequantize_bnb_weight(weight, getattr(module, "state", None))
    elif _is_of_torchao(weight):
        weight = weight.dequantize()
    return weight.detach()


@torch.no_grad()
def top_singular(group: LayerGroup, left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors of each pretrained weight of a group, and its singular values.

    The shapes are ``(n, left, d_out)``, ``(n, right, d_in)`` and ``(n, min(d_out, d_in))``.
    """
    vectors = []
    for name, module in zip(group.module_names, group.modules, strict=True):
        weight, size = dense_weight(module, name), min(group.d_out, group.d_in)
        if weight.is_meta:
            U, S, Vh = torch.eye(group.d_out), torch.ones(size), torch.eye(group.d_in)
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=max(left, right) > size)
        vectors.append((U.mT[:left], Vh[:right], S))
    lefts, rights, values = map(torch.stack, zip(*vectors, strict=True))
    return lefts, rights, values
