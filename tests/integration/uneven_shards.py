"""Run by torchrun: the loss of two processes with unequal batches on a network in shares (FSDP2).

One reads a few positions of its rows and the other most of them, so that whatever the library does
by what a batch reads, it does in one process alone.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyro
import tiny
from pyro.infer import TraceMeanField_ELBO

from pyro_blora.likelihoods import CausalLM


def main() -> None:
    """Writes the losses of a few steps, without and with the network in shares, to a file."""
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    pyro.settings.set(module_local_params=True)
    torch.manual_seed(0)
    nets = [tiny.llama(), tiny.llama()]
    nets[1].load_state_dict(nets[0].state_dict())
    for block in nets[1].model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(nets[1], mesh=mesh)
    batch = tiny.texts(4, 12)
    if rank == 0:
        batch["labels"][:, :8] = -100
    losses = []
    for net in nets:
        torch.manual_seed(0)
        blora = tiny.adapted(net, likelihood=CausalLM(num_data=12))
        elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        for _ in range(3):
            torch.manual_seed(1)
            loss = elbo(blora.model, blora.guide)(batch)
            loss.backward()
            losses.append(f"{loss.item():.4f}")
    Path(sys.argv[1], str(rank)).write_text(" ".join(losses))
    dist.destroy_process_group()
    # What DTensor remembers keeps the group's threads alive, and one that lets go of a tensor while
    # the interpreter ends aborts the process (pytorch/pytorch#179291).
    os._exit(0)


if __name__ == "__main__":
    main()
