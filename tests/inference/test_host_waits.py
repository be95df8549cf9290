"""How often a training step waits for the device, and what tells of a loss that is not finite."""

import math
from collections import Counter

import pytest
import tiny
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from waits import Waits

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.inference import fit, loop
from pyro_blora.likelihoods import CausalLM, MultipleChoice


@pytest.fixture
def after_step():
    """Calls a function after each step of an optimizer; a callback would have the figures read."""
    handles = []
    yield lambda do: handles.append(register_optimizer_step_post_hook(lambda *_: do()))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("likelihood", "batch"), [(CausalLM, tiny.texts), (MultipleChoice, tiny.choices)]
)
def test_a_step_waits_for_the_device_a_few_times(monkeypatch, after_step, likelihood, batch):
    """Pyro and the network wait, too; the limit catches a wait for each layer or particle."""
    blora = tiny.adapted(tiny.llama(20), likelihood=likelihood(num_data=12))
    rows = DataLoader([batch(4, seed=i) for i in range(3)], batch_size=None)
    waits, seen, most = Waits(), [], 16 + len(tiny.trained(blora))  # AdamW counts on the host
    monkeypatch.setattr(loop, "_SECONDS", float("inf"))
    after_step(lambda: seen.append(waits.count))
    with waits:
        fit(blora, rows, num_steps=5, held_out=0.0)
    assert 0 < seen[-1] - seen[-2] <= most


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize(
    ("name", "value"), [("model.v_proj.sigma_", math.nan), ("guide.v_proj_V.loc", 1e30)]
)
def test_what_is_not_finite_is_named(name, value):
    blora = tiny.adapted(num_data=10)
    torch.nn.init.constant_(blora.get_parameter(f"{name}_unconstrained"), value)
    with pytest.raises(NonFiniteLossError, match=name.partition(".")[2].partition("_V")[0]):
        tiny.train(blora)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's
@pytest.mark.parametrize("step", [3, loop._READ_EVERY])
def test_a_loss_that_is_not_finite_spoils_nothing_and_its_step_is_named(after_step, step):
    blora, done = tiny.adapted(num_data=10), Counter()
    after_step(lambda: done.update(["steps"]))

    def broken(module, args, output):
        if done["steps"] == step:
            output.logits = output.logits * torch.nan
        return output

    blora.net.register_forward_hook(broken)
    with pytest.raises(NonFiniteLossError, match=f"not finite at step {step}; "):
        fit(blora, tiny.examples(10), num_steps=30, collate=tiny.collate)
    assert done["steps"] <= step + loop._READ_EVERY
    assert all(value.isfinite().all() for value in tiny.trained(blora).values())
