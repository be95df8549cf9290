"""The endpoint of the tutorials, asked by many at once, answers as ``predict`` does."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora.likelihoods import SequenceClassification

pytest.importorskip("httpx", reason="needs fastapi and httpx")
testclient = pytest.importorskip("fastapi.testclient", reason="needs fastapi and httpx")

TEXTS = ["It froze.", "It thawed in the night.", "It rained."]
CLASSES = ("cold", "warm", "wet")


def saved(folder):
    tokenizer, net = build_tokenizer(TEXTS, pad="<pad>"), tiny.bert()
    net.resize_token_embeddings(len(tokenizer))
    likelihood = SequenceClassification(classes=CLASSES)
    options = {"target_modules": None, "likelihood": likelihood, "tokenizer": tokenizer}
    blora = tiny.shaken(tiny.adapted(net, **options), 0.2)
    for part in (net, tokenizer):
        part.save_pretrained(folder / "base")
    blora.save_pretrained(folder / "adapter")
    return blora


@pytest.mark.parametrize("num_samples", [0, 4])
def test_many_at_once_get_what_predict_gives(num_samples, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tutorials")
    import serve

    blora = saved(tmp_path)
    torch.manual_seed(0)
    expected = blora.predict(TEXTS, num_samples)
    threshold = expected.entropy.median().item()
    settings = {"ADAPTER": tmp_path / "adapter", "BASE": tmp_path / "base"}
    settings |= {"ABSTAIN_ABOVE": threshold, "NUM_SAMPLES": num_samples}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    client = testclient.TestClient(serve.from_environment())
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(client.post, "/predict", json={"texts": TEXTS}) for _ in range(24)]
        answers = [future.result().json() for future in found]
    assert all(answer == answers[0] for answer in answers)
    for k, answer in enumerate(answers[0]):
        assert answer["probs"] == dict(zip(CLASSES, expected.probs[k].tolist(), strict=True))
        assert answer["class"] == CLASSES[expected.predictions[k]]
        assert answer["mutual_information"] == expected.mutual_information[k].item()
        assert answer["abstain"] == (expected.entropy[k].item() > threshold)
    assert sum(answer["abstain"] for answer in answers[0]) == 1
    equal = {"texts": TEXTS[:1], "choices": [["cold", "cold"]]}
    refused = [client.post("/predict", json=json) for json in ({"texts": []}, equal)]
    assert [answer.status_code for answer in refused] == [422, 422]
    assert "must differ" in refused[1].text
