"""Data-parallel SVI with Accelerate: each process draws its own particles for its own examples.

    torchrun --nproc_per_node 2 tutorials/distributed.py                     (graphics cards)
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tutorials/distributed.py --out out/ddp
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tutorials/distributed.py --shard

Pyro's ``ELBO()(model, guide)`` is a torch module of the adapter's parameters alone, so Accelerate
wraps it as it is. Every process holds the frozen network, or with ``--shard`` its share of each
block (FSDP2), and the whole adapter, whose gradients are averaged. The mean of the processes'
losses is an unbiased estimate of the ELBO on all of their examples.

``--state FOLDER`` keeps the state of the training there and goes on from what it finds.
"""

import argparse
import gc
import os
import sys
from itertools import chain, repeat
from pathlib import Path

import pyro
import torch
from accelerate import Accelerator
from pyro.infer import TraceMeanField_ELBO
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora import BayesianLoRA, guides, likelihoods, models

ANSWERS, NUM_DATA, ROWS = (5, 6, 7), 64, 8


def network() -> LlamaForCausalLM:
    """A tiny random Llama, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def data() -> list[dict[str, torch.Tensor]]:
    """Random token rows with a class each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 32, (NUM_DATA, 6), generator=generator)
    labels = torch.randint(len(ANSWERS), (NUM_DATA,), generator=generator)
    mask = torch.ones(6, dtype=torch.long)
    return [
        {"input_ids": row, "attention_mask": mask, "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def adapter(net: LlamaForCausalLM, guide: str) -> BayesianLoRA:
    """The adapter, made alike in every process; ``num_data`` counts the rows of all of them."""
    return BayesianLoRA(
        net,
        target_modules=["q_proj", "v_proj"],
        prior=models.KroneckerInducing(rank=2),
        guide=getattr(guides, guide)(),
        likelihood=likelihoods.LabelTokens(token_ids=ANSWERS, num_data=NUM_DATA),
    )


def check_processes(together: int) -> None:
    """Ends the program where fewer processes work together than were launched."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if together != launched:
        raise SystemExit(
            f"{launched} processes were launched, and each would train by itself: without graphics "
            "cards, set ACCELERATE_USE_CPU=true and launch by torchrun."
        )


def end() -> None:
    """Takes the process group down before the interpreter does, and first what still holds it.

    Were DistributedDataParallel the last to hold it, that would end the group under Python's lock
    and wait for the group's threads, one of which may wait for the lock to let a tensor go.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main() -> None:
    """Trains for a few steps and writes the adapter of each process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guide", default="MatrixNormal", help="a class of pyro_blora.guides")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=1, help="batches in an optimizer step")
    parser.add_argument("--shard", action="store_true", help="share the network out (FSDP2)")
    parser.add_argument("--state", type=Path, help="folder of the training's state")
    parser.add_argument("--out", type=Path, help="folder for the adapter of each process")
    arguments = parser.parse_args()
    train(arguments)
    end()
    if arguments.shard:
        # What DTensor remembers keeps the group's threads alive, and one that lets go of a tensor
        # while the interpreter ends aborts the process (pytorch/pytorch#179291).
        sys.stdout.flush()
        os._exit(0)


def train(arguments: argparse.Namespace) -> None:
    """What ``main`` says; all that it makes is gone when it returns."""
    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate)
    check_processes(accelerator.num_processes)
    accelerator.print(f"{accelerator.num_processes} processes")
    pyro.settings.set(module_local_params=True)  # parameters belong to the modules
    net = network().to(accelerator.device)
    if arguments.shard:
        for block in net.model.layers:
            fully_shard(block)
        held = sum(p.to_local().numel() for p in net.model.layers.parameters())
        total = sum(p.numel() for p in net.model.layers.parameters())
        accelerator.print(f"holds {held} of the blocks' {total} weights")
    blora = adapter(net, arguments.guide)
    torch.manual_seed(1 + accelerator.process_index)  # its own draws
    rows = ROWS // (accelerator.num_processes * arguments.accumulate)
    # A loader draws a seed as it begins, which shall not come out of the posterior's draws
    own = torch.Generator()
    loader = torch.utils.data.DataLoader(data(), batch_size=rows, generator=own)
    elbo = TraceMeanField_ELBO(num_particles=rows, vectorize_particles=True, max_plate_nesting=1)
    loss_of = elbo(blora.model, blora.guide)
    optimizer = torch.optim.SGD(loss_of.parameters(), lr=1e-3, momentum=0.9)
    loss_of, optimizer, loader = accelerator.prepare(loss_of, optimizer, loader)
    done = 0
    if arguments.state and arguments.state.exists():
        accelerator.load_state(arguments.state)
        done = int((arguments.state / "batches").read_text())
    rest_of_epoch = accelerator.skip_first_batches(loader, done % len(loader))
    batches = chain(rest_of_epoch, chain.from_iterable(repeat(loader)))
    for step in range(done, done + arguments.steps * arguments.accumulate):
        with accelerator.accumulate(loss_of):
            loss = loss_of(next(batches))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        mean = accelerator.gather(loss.detach().reshape(1)).mean().item()
        accelerator.print(f"batch {step}: loss {mean:.3f}")
    if arguments.state:
        accelerator.save_state(arguments.state)
        if accelerator.is_main_process:
            (arguments.state / "batches").write_text(str(step + 1))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().clone() for name, t in blora.state_dict().items()}
        save_file(tensors, arguments.out / f"process-{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main()
