"""An adapter moves, sleeps and wakes with its network, as PEFT's do."""

import pytest
import tiny
import torch

from pyro_blora import predict_dataset


def inputs():
    return {name: value for name, value in tiny.sequences().items() if name != "labels"}


@pytest.mark.parametrize("how", ["half", "double"])
def test_a_dtype_is_the_network_s_and_what_is_variational_keeps_single_precision(how):
    """An optimizer holds the same tensors as before."""
    blora = tiny.adapted()
    kl, before = blora.kl(), blora.predict(tiny.sequences(), 0).samples
    held = dict(blora.named_parameters())
    moved = blora.to("cpu", torch.float64) if how == "double" else getattr(blora, how)()
    assert moved is blora
    wide = torch.float64 if how == "double" else torch.float32
    assert {p.dtype for p in blora.net.parameters()} == {getattr(torch, how)}
    assert {p.dtype for p in blora.parameters()} == {wide}
    assert all(p is held[name] for name, p in blora.named_parameters())
    torch.testing.assert_close(blora.kl().float(), kl)
    after = blora.predict(tiny.sequences(), 0).samples.float()
    torch.testing.assert_close(after, before, atol=1e-4 if how == "double" else 0.05, rtol=0)
    found = tiny.gradients(blora, tiny.sequences(), tiny.elbo(4))
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_modes_reach_the_network():
    blora = tiny.adapted(tiny.llama(attention_dropout=0.5))
    assert blora.training is blora.net.training is False  # as it was given
    blora.train()
    assert all(module.training for module in blora.net.modules())
    once, again = blora(**inputs()).logits, blora(**inputs()).logits
    assert not torch.allclose(once, again)
    blora.eval()
    assert not any(module.training for module in blora.net.modules())
    assert torch.equal(blora(**inputs()).logits, blora(**inputs()).logits)


def test_a_data_set_is_predicted_on_the_adapter_s_own_device(monkeypatch):
    """No card is here: what the choice of precision is asked about tells the device."""
    asked = []
    monkeypatch.setattr("pyro_blora.options._bfloat16_pays", lambda kind: asked.append(kind))
    blora, rows = tiny.adapted(), tiny.examples()
    monkeypatch.setattr(type(blora), "device", property(lambda self: torch.device("cuda")))
    for place in ("posterior.prediction", "posterior.bayesian_lora_model"):
        monkeypatch.setattr(f"pyro_blora.{place}.to_device", lambda batch, _: batch)
    for found, labels in (
        blora.predict_dataset(rows, tiny.collate, 2),
        predict_dataset(blora.predict, rows, tiny.collate),
    ):
        assert found.samples.shape[1:] == (10, 3)
        assert labels.tolist() == [row["label"] for row in rows]
    assert asked == ["cuda", "cuda"]


def test_a_network_without_weights_is_counted_and_not_run():
    with torch.device("meta"):
        net = tiny.llama()
    blora = tiny.adapted(net)
    assert blora.trainable_parameters > 0
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        blora.predict(tiny.sequences(), 1)
