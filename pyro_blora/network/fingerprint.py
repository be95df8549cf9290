"""Whether a network has the weights that an adapter was trained on: a few numbers tell."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_blora.network.quantised import is_quantised
from pyro_blora.network.targets import name_in_base

__all__ = ["altered", "fingerprint"]

_TENSORS, _NUMBERS = 512, 4  # at most, and of each
_EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PEFTS_OWN = ("lora_", "modules_to_save.")


def fingerprint(net: nn.Module, heads: Sequence[str] = ()) -> dict[str, Tensor]:
    """Four numbers of each tensor, in its own dtype and on the CPU, by its name in the base.

    Of a network of more than 512 tensors, of so many, evenly spread. Quantised weights, and those
    that are elsewhere (sharded, offloaded), are left out. A change of other numbers of a tensor
    than these four, as pruning may make, is not seen.

    Args:
        net: the network.
        heads: names in the base of heads that are trained, and so no part of it.
    """
    within = tuple(f"{head}." for head in heads)
    found = {name: t for name, t in _tensors(net) if not name.startswith(within)}
    names, count = list(found), min(_TENSORS, len(found))
    chosen = [names[k * len(names) // count] for k in range(count)]
    return {name: _numbers(found[name]) for name in chosen}


def altered(net: nn.Module, prints: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are not as in ``prints``, of those that can be compared.

    Numbers of one dtype must be equal; those of two, up to the rounding of the coarser. A tensor
    that is quantised now is not compared.
    """
    found, names = dict(_tensors(net)), []
    for name in prints.keys() & found.keys():
        before, now = prints[name], _numbers(found[name])
        rounding = 0.0
        if before.dtype != now.dtype:
            rounding = 2 * max(torch.finfo(t.dtype).eps for t in (before, now))
        if before.shape != now.shape or not torch.allclose(
            now.double(), before.double(), rtol=rounding, atol=1e-6 * rounding, equal_nan=True
        ):
            names.append(name)
    return sorted(names)


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of a network by their names in the base, without PEFT's own."""
    for path, module in net.named_modules():
        if is_quantised(module):
            continue
        for name, tensor in module.named_parameters(prefix=path, recurse=False):
            here = tensor.dtype in _EXACT and not tensor.is_meta and tensor.numel()
            if here and not hasattr(tensor, "full_tensor"):  # as a DTensor has, a share of it
                base = name_in_base(name)
                if base == name or not any(own in name for own in _PEFTS_OWN):
                    yield base, tensor


def _numbers(tensor: Tensor) -> Tensor:
    count = min(_NUMBERS, tensor.numel())
    at = [(2 * k + 1) * tensor.numel() // (2 * count) for k in range(count)]
    return tensor.detach().reshape(-1)[at].cpu()
