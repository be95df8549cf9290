import runpy
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from own_classes import OfX
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_blora import BayesianLoRA
from pyro_blora.guides import MeanField
from pyro_blora.models import KroneckerInducing

PATH = Path(__file__).resolve().parents[2] / "tutorials" / "minimal.py"


class Regression(OfX):
    def distribution(self, logits, labels):
        return dist.Normal(logits, 0.1).to_event(1)

    def check_labels(self, labels, logits):
        pass


def test_it_learns_and_the_library_gives_the_same_losses():
    minimal = SimpleNamespace(**runpy.run_path(str(PATH)))
    expected = minimal.train(num_steps=300)
    assert sum(expected[-20:]) < 0.5 * sum(expected[:20])
    W0, x, y = minimal.make_data()
    pyro.clear_param_store()
    net = nn.Sequential()
    net.layer = nn.Linear(minimal.D_IN, minimal.D_OUT, bias=False)
    net.layer.weight.data.copy_(W0)
    prior = KroneckerInducing(rank=minimal.RANK, sigma=minimal.SIGMA, noise_init=minimal.NOISE_INIT)
    parts = {"prior": prior, "guide": MeanField(init_scale=minimal.INIT_SCALE)}
    likelihood = Regression(num_data=minimal.NUM_DATA)
    blora = BayesianLoRA(net, target_modules=["layer"], likelihood=likelihood, **parts)
    # The same draws start Z here and there; the library's prior sampled once to find its sites.
    group = blora.model.layer
    torch.manual_seed(1)
    torch.randn(minimal.RANK, minimal.RANK)  # the tutorial's first guide draw comes first
    with torch.no_grad():
        group.Z_r.copy_(torch.randn(minimal.RANK, minimal.D_OUT) * minimal.D_OUT**-0.5)
        group.Z_c.copy_(torch.randn(minimal.RANK, minimal.D_IN) * minimal.D_IN**-0.5)
    after = torch.get_rng_state()
    svi = SVI(blora.model, blora.guide, Adam({"lr": 0.02}), TraceMeanField_ELBO())
    batch = {"x": x, "labels": y}
    torch.manual_seed(1)
    losses = [svi.step(batch)]
    torch.set_rng_state(after)
    losses += [svi.step(batch) for _ in range(59)]
    assert losses == pytest.approx(expected[:60], rel=2e-4)
