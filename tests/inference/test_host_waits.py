"""How often a training step waits for the device, and what tells of a loss that is not finite."""

import traceback
from collections import Counter

import pytest
import tiny
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.inference import fit, loop
from pyro_blora.inference.loop import _READ_EVERY
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Waits(TorchDispatchMode):
    """Counts what would stop the host until an accelerator has caught up, by where it is asked."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        waits = name in WAITS or any(i is not None and i.dtype == torch.bool for i in indices)
        frames = traceback.extract_stack() if waits else []
        # AdamW keeps its count of steps on the host
        if frames and not any(f.name == "step" and "optim" in f.filename for f in frames):
            place = next(f for f in reversed(frames) if "pyro" in f.filename)
            self.places[f"{place.filename}:{place.lineno}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def after_step():
    """Calls a function after each step of an optimizer; a callback would have the figures read."""
    handles = []
    yield lambda do: handles.append(register_optimizer_step_post_hook(lambda *_: do()))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("likelihood", "batch", "most"),
    [
        (LabelTokens(token_ids=tiny.ANSWERS, num_data=12), tiny.sequences, 11),
        (CausalLM(num_data=12), tiny.texts, 14),
        (MultipleChoice(num_data=12), tiny.choices, 10),
    ],
)
def test_a_step_waits_for_the_device_a_few_times(monkeypatch, after_step, likelihood, batch, most):
    """In a step that is not the first, and once more if figures are read, as for a callback.

    Four waits are Pyro's, two are the network's own for its mask, and four (of options six) are of
    labels, padding and options on a CPU, which are not looked at elsewhere.
    """
    blora = tiny.adapted(likelihood=tiny.anew(likelihood))
    rows = DataLoader([batch(4, seed=i) for i in range(3)], batch_size=None)
    waits, seen, found = Waits(), [], []
    monkeypatch.setattr(loop, "_SECONDS", float("inf"))
    for name in ("tolist", "cpu"):  # which a CPU answers without an operator
        own = getattr(torch.Tensor, name)
        look = lambda x, own=own, name=name: waits.places.update([name]) or own(x)  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, look)
    after_step(lambda: seen.append(Counter(waits.places)))
    for callback in (None, id):
        with waits:
            fit(blora, rows, num_steps=5, held_out=0.0, callback=callback)
        found.append(seen[-1] - seen[-2])
    assert found[0].total() <= most, found
    assert found[1].total() == found[0].total() + 1


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's
@pytest.mark.parametrize("step", [3, _READ_EVERY])
def test_a_loss_that_is_not_finite_is_told_by_its_step_before_anything_is_saved(
    tmp_path, after_step, step
):
    """Some steps later; and the step itself has spoiled nothing."""
    blora, done = tiny.adapted(num_data=10), []
    after_step(lambda: done.append(None))

    def broken(module, args, output):
        if len(done) == step:
            output.logits = output.logits * torch.nan
        return output

    blora.net.register_forward_hook(broken)
    with pytest.raises(NonFiniteLossError, match=f"not finite at step {step}; "):
        fit(blora, tiny.examples(10), num_steps=30, collate=tiny.collate)
    assert len(done) <= step + _READ_EVERY
    assert all(value.isfinite().all() for value in tiny.trained(blora).values())
