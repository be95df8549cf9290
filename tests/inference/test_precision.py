"""``precision="auto"``: bfloat16 where the device is made for it, float32 elsewhere."""

import pytest
import tiny
import torch

from pyro_blora.guides import Isotropic
from pyro_blora.inference import finish, fit
from pyro_blora.network import precision
from pyro_blora.posterior.prediction import predict_dataset


def run_fit(net, **options):
    fit(
        tiny.adapted(net, num_data=10),
        tiny.examples(),
        collate=tiny.collate,
        num_steps=1,
        **options,
    )


def run_finish(net, **options):
    blora = tiny.adapted(net, guide=Isotropic())
    finish(blora, tiny.examples(), collate=tiny.collate, **options)


def run_predict(net, **options):
    predict_dataset(tiny.adapted(net).predict, tiny.examples(), tiny.collate, **options)


@pytest.mark.parametrize("run", [run_fit, run_finish, run_predict])
@pytest.mark.parametrize(
    ("pays", "options", "expected"),
    [(True, {}, True), (False, {}, False), (True, {"precision": "float32"}, False)],
)
def test_auto_is_the_default_everywhere(monkeypatch, run, pays, options, expected):
    monkeypatch.setattr(precision, "_bfloat16_pays", lambda kind: pays)
    net, seen = tiny.llama(), set()
    net.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.add(torch.is_autocast_enabled("cpu"))
    )
    run(net, **options)
    assert (True in seen) is expected
