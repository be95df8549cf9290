"""Checkpoints from before groups of layers were called after one kind each.

All layers of one shape were one group then, called ``"q_proj_v_proj"`` where q and v were alike.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["from_old_groups"]


def from_old_groups(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor], model: Any
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names, and for the layers, of today's groups.

    Args:
        saved: tensors by name; of a new checkpoint as they are.
        own: those of the adapter that shall have them.
        model: its :class:`~pyro_blora.posterior.bayesian_lora_model.BayesianLoRAModel`.

    Returns:
        Those of an old group cut along the dimension of its layers, and whole where they have none.
    """
    if own.keys() <= saved.keys():
        return dict(saved)
    old = _old_groups(model)
    found, used = {}, set()
    for group in model.groups:
        name, members = next(o for o in old.items() if group.module_names[0] in o[1])
        rows = torch.tensor([members.index(module) for module in group.module_names])
        for key in own:
            for start in ("model.{}.", "guide.{}_"):
                rest = key.removeprefix(start.format(group.name))
                before = start.format(name) + rest
                if rest != key and before in saved:
                    found[key] = _cut(saved[before], own[key], rows, len(members))
                    used.add(before)
    return {**{key: tensor for key, tensor in saved.items() if key not in used}, **found}


def _old_groups(model: Any) -> dict[str, list[str]]:
    """The full names of the layers of each group, as they were once put together."""
    shapes = {name: (g.d_out, g.d_in) for g in model.groups for name in g.module_names}
    members: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in (name for name, _ in model.net.named_modules() if name in shapes):
        members[shapes[name]].append(name)
    names = {s: "_".join(sorted({n.rsplit(".", 1)[-1] for n in m})) for s, m in members.items()}
    groups = {}
    for (d_out, d_in), layers in members.items():
        name = names[d_out, d_in]
        if list(names.values()).count(name) > 1 or name.isdigit():
            name = f"{name}_{d_out}x{d_in}"
        groups[f"layer_{name}" if name[0].isdigit() else name] = layers
    return groups


def _cut(tensor: Tensor, like: Tensor, rows: Tensor, count: int) -> Tensor:
    """What belongs to some of the ``count`` layers that a tensor is stacked of."""
    if tensor.shape == (count, count) and like.shape == (len(rows), len(rows)):
        # LayerCoupled's factor of a covariance between layers
        factor = transform_to(constraints.lower_cholesky)
        L = factor(tensor)[rows]
        return factor.inv(torch.linalg.cholesky(L @ L.mT))
    sizes = zip(tensor.shape, like.shape, strict=False)
    dims = [dim for dim, pair in enumerate(sizes) if pair == (count, len(rows))]
    return tensor.index_select(dims[0], rows) if tensor.shape != like.shape and dims else tensor
