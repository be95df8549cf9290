"""How often a training step waits for the device, and what tells of a loss that is not finite."""

import math
from collections import Counter
from functools import partial

import pytest
import tiny
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from waits import Waits

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.inference import fit, loop
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice


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
        (CausalLM, tiny.texts, 8),
        (MultipleChoice, tiny.choices, 5),
        (partial(LabelTokens, token_ids=tiny.ANSWERS), tiny.sequences, 7),
    ],
    ids=["text", "options", "label words"],
)
def test_a_step_waits_for_the_device_a_few_times(monkeypatch, after_step, likelihood, batch, most):
    """Four of them are Pyro's, and two the network's; more layers or particles add none."""
    blora = tiny.adapted(tiny.llama(20), likelihood=likelihood(num_data=12))
    rows = DataLoader([batch(4, seed=i) for i in range(3)], batch_size=None)
    waits, seen = Waits(), []
    monkeypatch.setattr(loop, "_SECONDS", float("inf"))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on an accelerator, without its checks
    after_step(lambda: seen.append(waits.count))
    with waits:
        fit(blora, rows, num_steps=5, held_out=0.0)
    assert 0 < seen[-1] - seen[-2] - len(tiny.trained(blora)) <= most  # AdamW counts on the host


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
