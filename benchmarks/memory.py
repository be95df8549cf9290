"""The memory table of docs/large_models.md, computed with fake tensors: no weights, no GPU.

It takes some minutes. A training step and a prediction with draws run on tensors without values,
and the bytes of all live storages are summed, without the allocator's overhead, workspaces of
kernels and the CUDA context. The network is in bfloat16, a batch has 8 rows of 256 tokens with one
particle each, and a prediction has 10 draws. The last row is the setting of large.py: lm_head is
adapted, too, 4 rows train and 16 are asked, each a question of 128 tokens with four options of 32.
"""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import cost
import pyro
import torch
from cells import markdown
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from pyro_blora import BayesianLoRA
from pyro_blora.likelihoods import LabelTokens, Likelihood, MultipleChoice, packing
from pyro_blora.models import KroneckerInducing

NAMES = (*cost.NAMES, "tie_word_embeddings")
SIZES = {
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama-2-7B
    "70B": (8192, 28672, 80, 64, 8, 32000, False),  # Llama-2-70B
}


class Bytes(TorchDispatchMode):
    """Sums the bytes of all live storages; a value read from a fake tensor is False, or 1.0."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts the storages of its results until they are freed."""
        if func is torch.ops.aten._local_scalar_dense.default and hasattr(args[0], "fake_mode"):
            return args[0].dtype.is_floating_point and 1.0
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            storage = value.untyped_storage() if isinstance(value, Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return results

    def peak_of(self, run: Callable[[], Any]) -> int:
        """The largest number of live bytes in the course of ``run``."""
        gc.collect()
        self.peak = self.now
        run()
        return self.peak

    def _free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size


def choices(items: int) -> dict[str, Tensor]:
    """Questions of 128 tokens with four options of 32; their sizes are fixed, for none is read."""
    ids = torch.ones(items, 4, 160, dtype=torch.long)
    scored = (torch.arange(160) >= 128).expand_as(ids)
    packing._sizes = lambda batch, keep, scored: (256, 128, 128 * len(keep))
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "option_mask": scored, "labels": ids[:, 0, 0]}


def measure(
    shape: dict[str, Any], rows: int, tokens: int, draws: int, asked: int = 0
) -> dict[str, int]:
    """Bytes of weights and adapter, and peaks; with ``asked`` questions lm_head is adapted."""
    with Bytes() as count:
        net = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()
        likelihood: Likelihood = LabelTokens(token_ids=cost.ANSWERS, num_data=100)
        if asked:
            likelihood = MultipleChoice(num_data=100, pack=True)
        targets = [*cost.TARGETS, *(["lm_head"] if asked else [])]
        prior = KroneckerInducing(sigma=0.1)  # the default reads the norms of the weights
        blora = BayesianLoRA(net, target_modules=targets, prior=prior, likelihood=likelihood)
        ids = torch.ones(rows, tokens, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # a row with padding, because a network may drop the mask without it
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0]}
        found = training(count, blora, choices(rows) if asked else batch)
        batch = choices(asked) if asked else batch
        for name, most in (("a draw", 1), ("all draws", 10**6)):
            found[name] = count.peak_of(partial(blora.log_predictive, batch, draws, max_rows=most))
    weights = sum(p.nbytes for p in net.parameters())
    linear = sum(p.numel() for p in net.model.layers.parameters() if p.dim() == 2)
    found |= {"weights": weights, "16 n": 16 * blora.trainable_parameters}
    # bitsandbytes stores half a byte for each weight of a block, and 4 bytes for each 64 weights
    found["in 4 bits"] = weights - int(linear * (2 - 0.5 - 4 / 64))
    return found


def training(count: Bytes, blora: BayesianLoRA, batch: dict[str, Tensor]) -> dict[str, int]:
    rows = len(batch["labels"])
    bound = TraceMeanField_ELBO(rows, max_plate_nesting=1, vectorize_particles=True)
    loss_of = bound(blora.model, blora.guide)
    optimizer = torch.optim.AdamW(blora.parameters())

    def step() -> None:
        loss_of(batch).backward()
        optimizer.step()

    step()  # the first step makes the optimizer's state
    found = {"step": count.peak_of(step)}
    older = blora.net.gradient_checkpointing_enable  # before transformers 5.24
    getattr(blora.net, "activation_checkpointing_enable", older)({"use_reentrant": False})
    blora.net.train()  # transformers checkpoints in training mode alone
    found["checkpointed"] = count.peak_of(step)
    blora.net.eval()
    optimizer.zero_grad()
    return found


def main() -> None:
    pyro.enable_validation(False)  # as in `fit`: the checks would read values
    columns = ("weights", "in 4 bits", "16 n", "step", "checkpointed", "a draw", "all draws")
    lines = []
    for size, (rows, asked) in {**dict.fromkeys(SIZES, (8, 0)), "7B, large.py": (4, 16)}.items():
        shape = dict(zip(NAMES, SIZES[size.partition(",")[0]], strict=True))
        with FakeTensorMode(shape_env=ShapeEnv()):
            found = measure(shape, rows, tokens=256, draws=10, asked=asked)
        found = {name: found[name] / 2**30 for name in columns}
        lines.append([size, *(f"{gib:.{2 if gib < 1 else 1}f}" for gib in found.values())])
    print("\n".join(markdown(["Llama", *columns], lines)))


if __name__ == "__main__":
    main()
