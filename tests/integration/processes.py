"""Trainings by this process, or by the two of torchrun: the tutorials' and one of uneven batches.

All in one program, because each process needs seconds to import what it uses.
"""

import argparse
import os
import sys
from pathlib import Path

import distributed
import tiny
import torch
import trainer
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard

from pyro_blora.likelihoods import CausalLM

OUT = Path(sys.argv[1])


def train(out, program=distributed, **options):
    """One training, as a program of its own starts it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    usual = {"guide": "MatrixNormal", "steps": 4, "accumulate": 1, "shard": False}
    usual |= {"state": None, "resume": False}
    program.train(argparse.Namespace(out=OUT / out, **{**usual, **options}))


def shared_out(rank):
    """Losses of a few steps, without and with the network in shares (FSDP2).

    One process reads a few positions of its rows and the other most of them, so that whatever the
    library does by what a batch reads, it does in one process alone.
    """
    torch.manual_seed(0)
    nets = [tiny.llama(), tiny.llama()]
    nets[1].load_state_dict(nets[0].state_dict())
    for module in (*nets[1].model.layers, nets[1]):
        fully_shard(module)
    batch = tiny.texts(4, 12)
    if rank == 0:
        batch["labels"][:, 4:] = -100
    losses = []
    for net in nets:
        torch.manual_seed(0)
        blora = tiny.adapted(net, likelihood=CausalLM(num_data=12))
        for _ in range(3):
            torch.manual_seed(1)
            loss = tiny.elbo(4)(blora.model, blora.guide)(batch)
            loss.backward()
            losses.append(f"{loss.item():.4f}")
    (OUT / f"losses-{rank}").write_text(" ".join(losses))


# The point draws nothing, so that two half batches are one whole batch exactly
train("point", guide="Delta")
train("trainer", trainer, guide="Delta")
train("drawn", steps=10)
if torch.distributed.is_initialized():
    train("shared", guide="Delta", shard=True)
    train("stopped", steps=5, state=OUT / "state")
    train("resumed", steps=5, state=OUT / "state")
    train("trainer, drawn", trainer)
    shared_out(torch.distributed.get_rank())
    distributed.end()
    sys.stdout.flush()
    os._exit(0)  # as the tutorial does after --shard
train("accumulated", guide="Delta", accumulate=2)
