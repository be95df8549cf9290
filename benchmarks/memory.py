"""The memory table of docs/large_models.md: computed with fake tensors, without a weight or a card.

    python benchmarks/memory.py                        the table in GiB, seven minutes
    python benchmarks/memory.py --sizes 7B --rows 4 --tokens 1024 --top 8

A fake tensor has a shape and no values. A training step and a prediction by draws run on them, and
the bytes of all storages that are alive are added up. What an allocator, its kernels and a card's
context hold besides is not in it. The network is in bfloat16, a particle for each example.
"""

import argparse
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import timing
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from pyro_blora import BayesianLoRA
from pyro_blora.likelihoods import LabelTokens

NAMES = (*timing.NAMES, "tie_word_embeddings")
SIZES = {
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama-2-7B
    "70B": (8192, 28672, 80, 64, 8, 32000, False),  # Llama-2-70B
}


class Bytes(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive; fake tensors' values are all no or one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and notes what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and hasattr(args[0], "fake_mode"):
            return args[0].dtype.is_floating_point and 1.0  # False, which is 0, for all others
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """A storage is no more."""
        self.alive.remove(key)
        self.now -= size


def measure(shape: dict[str, Any], rows: int, tokens: int, draws: int, top: int) -> dict[str, int]:
    """Bytes of the weights, as they are and in 4 bits, trained numbers, and peaks in bytes."""
    with Bytes() as count:
        config = LlamaConfig(**shape)
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        blocks = config.num_hidden_layers
        options = {"layers_to_transform": list(range(blocks - (top or blocks), blocks))}
        options |= {"likelihood": LabelTokens(token_ids=timing.ANSWERS, num_data=100)}
        blora = BayesianLoRA(net, target_modules=timing.TARGETS, **options)
        ids = torch.ones(rows, tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # without padding a network may need no mask
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0]}
        found = training(count, blora, batch)
        for name, most in (("a draw", rows), ("all draws", rows * draws)):
            found[name] = peak(count, partial(blora.log_predictive, batch, draws, max_rows=most))
    weights = sum(p.nbytes for p in net.parameters())
    linear = sum(p.numel() for p in net.model.layers.parameters() if p.dim() == 2)
    found |= {"weights": weights, "16 n": 16 * blora.trainable_parameters}
    # As bitsandbytes stores the blocks: half a byte, and 4 bytes for each 64 weights
    found["in 4 bits"] = weights - int(linear * (2 - 0.5 - 4 / 64))
    return found


def training(count: Bytes, blora: BayesianLoRA, batch: dict[str, Tensor]) -> dict[str, int]:
    """The peak of a step of AdamW, and of one whose activations are checkpointed."""
    rows = len(batch["labels"])
    bound = TraceMeanField_ELBO(rows, max_plate_nesting=1, vectorize_particles=True)
    loss_of = bound(blora.model, blora.guide)
    optimizer = torch.optim.AdamW(blora.parameters())

    def step() -> None:
        loss_of(batch).backward()
        optimizer.step()

    step()  # which makes the optimizer's state
    found = {"step": peak(count, step)}
    blora.net.activation_checkpointing_enable({"use_reentrant": False})
    blora.net.train()  # in evaluation mode transformers checkpoints nothing
    found["checkpointed"] = peak(count, step)
    blora.net.eval()
    optimizer.zero_grad()
    return found


def peak(count: Bytes, run: Callable[[], Any]) -> int:
    """The most bytes alive during ``run``."""
    gc.collect()
    count.peak = count.now
    run()
    return count.peak


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=8, help="of a batch; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="of a row; default: %(default)s")
    parser.add_argument("--draws", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--top", type=int, default=0, help="adapted blocks; default: all")
    chosen = parser.parse_args()
    pyro.enable_validation(False)  # as in `fit`; the checks would ask for values
    columns = ("weights", "in 4 bits", "16 n", "step", "checkpointed", "a draw", "all draws")
    print("| Llama | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for size in chosen.sizes.split(","):
        shape = dict(zip(NAMES, SIZES[size], strict=True))
        with FakeTensorMode(shape_env=ShapeEnv()):
            found = measure(shape, chosen.rows, chosen.tokens, chosen.draws, chosen.top)
        cells = [f"{found[name] / 2**30:.{2 if found[name] < 2**30 else 1}f}" for name in columns]
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
